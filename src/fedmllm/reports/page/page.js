// Sort a table by a click on a column's head: numbers by data-value, words as words.
document.querySelectorAll("table.sortable th button").forEach((button) => {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const table = head.closest("table");
    const column = [...head.parentNode.children].indexOf(head);
    const falling = head.getAttribute("aria-sort") !== "descending";
    const key = (row) => {
      const cell = row.children[column];
      const value = cell.dataset.value ?? cell.textContent.trim();
      return value === "" ? -Infinity : isNaN(value) ? value : Number(value);
    };
    const order = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
    const body = table.tBodies[0];
    const rows = [...body.rows].sort((a, b) => order(key(a), key(b)) * (falling ? -1 : 1));
    body.append(...rows);
    table.querySelectorAll("th[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", falling ? "descending" : "ascending");
  });
});

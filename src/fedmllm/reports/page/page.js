// Sort a table by a click on a column's head. Words: ascending, descending, as it was. Numbers: descending first.
document.querySelectorAll("table.sortable").forEach((table) => {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const key = (row, column) => {
    const cell = row.children[column];
    const value = cell.dataset.value ?? cell.textContent.trim();
    return value === "" ? null : isNaN(value) ? value : Number(value);
  };
  table.querySelectorAll("thead th button").forEach((button) => {
    button.addEventListener("click", () => {
      const head = button.closest("th");
      const column = [...head.parentNode.children].indexOf(head);
      const keys = new Map(original.map((row) => [row, key(row, column)]));
      const isWords = [...keys.values()].some((value) => typeof value === "string");
      const order = isWords ? ["ascending", "descending", ""] : ["descending", "ascending", ""];
      const now = order[(order.indexOf(head.getAttribute("aria-sort") ?? "") + 1) % 3];
      const compare = (a, b) => (isWords ? String(a).localeCompare(String(b), undefined, { numeric: true }) : a - b);
      const rows = [...original];
      if (now) {
        rows.sort((a, b) => {
          const [x, y] = [keys.get(a), keys.get(b)];
          if (x === null || y === null) return (x === null) - (y === null); // cells without a value last
          return compare(x, y) * (now === "ascending" ? 1 : -1);
        });
      }
      body.append(...rows);
      table.querySelectorAll("th[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
      if (now) head.setAttribute("aria-sort", now);
    });
  });
});

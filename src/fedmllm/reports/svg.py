"""Matplotlib figures as inline SVG: themed, selectable, accessible."""

from __future__ import annotations

import io
import re
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours that figures are drawn in, and the CSS variables that the page reads them as.
TEXT_COLOR, MUTED, _GRID, SURFACE = "#010001", "#010002", "#010003", "#010004"
NUM_SERIES = 10
SERIES = [f"#0100{16 + i:02x}" for i in range(NUM_SERIES)]
BASELINES = ["#010030", "#010031", "#010032"]  # zero-shot, local, other baselines
SHOWS = {"both": "#010040", "image": "#010041", "text": "#010042", "none": "#010043"}
_VARIABLES = {TEXT_COLOR: "--text", MUTED: "--muted", _GRID: "--grid", SURFACE: "--surface"}
_VARIABLES |= {colour: f"--s{i}" for i, colour in enumerate(SERIES)}
_VARIABLES |= {colour: f"--b{i}" for i, colour in enumerate(BASELINES)}
_VARIABLES |= {colour: f"--show-{name}" for name, colour in SHOWS.items()}

STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": TEXT_COLOR,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "savefig.transparent": True,
}


def variable(colour: str) -> str:
    """The CSS of a figure's colour, for a legend in HTML."""
    return f"var({_VARIABLES[colour]})"


def inline(figure: Figure, title: str, description: str, key: str) -> str:
    """The figure as an <svg> element with title and description; `key` keeps its ids apart from other figures'."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": key}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    head, _, body = text.partition(">")
    view = re.search(r'viewBox="([^"]+)"', head)
    box = view.group(1) if view else "0 0 360 270"
    width = float(box.split()[2])
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", body)  # group names that nothing refers to
    body = re.sub(r"(\d+\.\d{2})\d+", r"\1", body)
    body = re.sub(r"font: (\w* ?)([\d.]+)px [^;\"]*", r"font: \1\2px var(--font)", body)
    body = re.sub(r"\n\s*", "\n", body)
    for colour, name in _VARIABLES.items():
        body = body.replace(colour, f"var({name})")
    return (
        f'<svg role="img" aria-labelledby="{key}-t {key}-d" viewBox="{box}" style="width:100%;max-width:{width * 4 / 3:.0f}px"'
        f' xmlns:xlink="http://www.w3.org/1999/xlink"><title id="{key}-t">{escape(title)}</title>'
        f'<desc id="{key}-d">{escape(description)}</desc>{body}'
    )

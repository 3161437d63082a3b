"""What the figures share: colours, style, SVG text without a trace of where it was made.

Nothing here touches pyplot or leaves a changed matplotlib setting behind.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib.style

INK, GREY, BLUE, RED = "#1f2933", "#a8b2bd", "#2b5c8a", "#b3261e"
WIDTH = 9.2  # inches; the page's text column
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 8.5,
    "axes.titlesize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#7b8794",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": "#52606d",
    "ytick.color": "#52606d",
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


@contextmanager
def style(salt: str) -> Iterator[None]:
    with (
        warnings.catch_warnings(),
        matplotlib.style.context(["default", {**_STYLE, "svg.hashsalt": salt}]),
    ):
        # The reader's fonts are used, not the ones matplotlib measures with.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def svg(figure: Any, description: str, *, transparent: bool = True) -> str:
    """The figure without XML header, metadata and unused ids, described for screen readers."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=transparent, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    label = html.escape(" ".join(description.split()), quote=True)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def shorten(name: str, length: int = 18) -> str:
    """`name` on one line, cut to `length` characters."""
    name = " ".join(name.split())
    return name if len(name) <= length else name[: length - 1] + "…"

"""From a matplotlib figure to deterministic SVG text that follows the colours and the fonts of its page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure

__all__ = ["INK", "MARKERS", "SERIES", "Svg", "house_style", "label", "new_figure", "to_svg"]

INK = "#010203"  # text, axes and grid: stands for the page's text colour
SERIES = (
    "#0072b2",
    "#c84e00",
    "#00805d",
    "#a8447e",
    "#8a6500",
    "#555555",
)  # Okabe-Ito hues, darkened for white
MARKERS = ("o", "s", "D", "^", "v", "P", "X")  # shape tells series apart where colour can't

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: searchable, read aloud, set in the page's font
    "svg.hashsalt": "monteclora",
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so layout is the same on every machine
    "font.size": 10.0,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "text.parse_math": False,  # a label "$5 or $6" is not a formula
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.14,
    "grid.linewidth": 0.6,
    "axes.linewidth": 0.6,
    "figure.constrained_layout.use": True,
}

_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
_TAG = re.compile(r"<[^<>]*>")  # matplotlib escapes < and > in text and in attributes
_ID = re.compile(r'(\bid="|href="#|clip-path="url\(#)')
_LONGEST_LABEL = 32


class Svg(str):
    """SVG drawn by this package: the only text a page embeds without escaping it."""

    __slots__ = ()

    def with_id_prefix(self, prefix: str) -> Svg:
        """The same drawing with ``prefix`` before each id, so that several fit into one document."""
        return Svg(_in_tags(self, lambda tag: _ID.sub(rf"\g<1>{prefix}", tag)))


@contextmanager
def house_style() -> Iterator[None]:
    """Draw with matplotlib's defaults and ours, whatever the user's configuration; usable as a decorator."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        # The browser draws the text, in a font that has the glyph.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
        yield


def new_figure(height: float) -> Figure:
    """An empty transparent figure, 4.6 in wide (readable on a phone) and ``height`` in high."""
    figure = Figure(figsize=(4.6, height))
    figure.patch.set_visible(False)
    return figure


def label(text: str) -> str:
    """``text`` on one line, without control characters, cut to what fits beside a legend's handle."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    line = " ".join(printable.split())
    return line if len(line) <= _LONGEST_LABEL else line[: _LONGEST_LABEL - 1].rstrip() + "…"


def to_svg(figure: Figure, description: str) -> Svg:
    """The drawing as one ``<svg>`` element, the same bytes for the same figure.

    Colours become CSS: ``INK`` is ``currentColor``, and ``SERIES[i]`` is ``var(--series-i)`` with itself as
    fallback, so a page in dark mode restyles them.

    Args:
        figure: drawn under ``house_style``.
        description: what a screen reader says in place of the drawing.
    """
    for axes in figure.axes:
        axes.patch.set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
    text = re.sub(r"<!--.*?-->|<style.*?</style>", "", buffer.getvalue(), flags=re.DOTALL)
    themed = _in_tags(text[text.index("<svg") :], _themed).strip()
    # matplotlib's own style element would reach the whole page; this says the same for the drawing alone.
    opening = f'<svg role="img" aria-label="{escape(description)}" stroke-linejoin="round"'
    return Svg(themed.replace("<svg", opening, 1))


def _themed(tag: str) -> str:
    for index, colour in enumerate(SERIES):
        tag = tag.replace(colour, f"var(--series-{index}, {colour})")
    return tag.replace(INK, "currentColor")


def _in_tags(text: str, change: Callable[[str], str]) -> str:
    return _TAG.sub(lambda match: change(match[0]), text)

"""Drawings as inline SVG whose colours are the page's own, so that they follow its light or dark form.

matplotlib writes fixed colours; those of `INK`, `LINE` and `COLOURS` are placeholders, replaced by CSS variables afterwards.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

INK, LINE = "#010203", "#040506"
# Which colour a variable has is said in page.html, for light and for dark pages.
COLOURS = tuple(f"#0a0b{number:02x}" for number in range(1, 9))
_VARIABLES = {INK: "var(--soft)", LINE: "var(--line)"} | {
    colour: f"var(--c{number})" for number, colour in enumerate(COLOURS, start=1)
}
# A width at which nine points are still read when the drawing fills a phone.
WIDTH_IN = 4.3
# Places that do not end an epoch.
PLACES = {0: "before", 0.5: "warm-up"}


def colour_of(number: int) -> str:
    """The colour of the n-th run (from 0)."""
    return COLOURS[number % len(COLOURS)]


def svg(draw: Callable[[Any], None], label: str, height_in: float = 2.6, width_in: float = WIDTH_IN) -> str:
    """`draw(axes)` as an `<svg>` element that scales with the page; text stays text. `label` is read to those who cannot see it."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": label,
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": LINE,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "legend.frameon": False,
        "legend.fontsize": 8,
    }
    with mpl.rc_context(style):
        # Without pyplot, which would keep windows in mind, and with fixed margins: a layout that is measured takes twice the time.
        figure = Figure(figsize=(width_in, height_in))
        axes = figure.add_axes((0.52 / width_in, 0.44 / height_in, 1 - 0.62 / width_in, 1 - 0.54 / height_in))
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Names of groups would occur once a drawing.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for fixed, variable in _VARIABLES.items():
        text = text.replace(fixed, variable)
    return text.replace("<svg ", f'<svg role="img" aria-label="{_attribute(label)}" ', 1)


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")


def epoch_ticks(axes: Any, epochs: Sequence[float]) -> None:
    """Whole epochs on the x axis, "before" and "warm-up" in words; of many only as many as can be read."""
    places = sorted(set(epochs))
    whole = [epoch for epoch in places if epoch == int(epoch)]
    shown = places if len(places) <= 6 else whole[:: -(-len(whole) // 6)]
    axes.set_xticks(shown, [PLACES.get(epoch, f"{epoch:g}") for epoch in shown])

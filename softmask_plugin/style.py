"""The style of all figures."""

from __future__ import annotations

from typing import Any

INK = "#1f2328"  # on the page replaced by its text colour, so that figures follow a dark theme
MUTED = "#848b94"  # legible on white and on black
ACCENT = "#3d7fd0"
COLOURS = (ACCENT, "#d9782d", "#3a9a5b", "#9a63c4", "#c9506b", "#8a7a35")  # of runs, in order
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # captions may contain dollar signs
    "text.usetex": False,  # captions must never reach LaTeX, whatever the user's matplotlibrc says
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}

"""A run as one page to look at: curves, recalls against chance, and where each word looks."""

from softmask_plugin.pointing import pointing_game, swapped
from softmask_plugin.report.figures import loss_curves, validation_curves
from softmask_plugin.report.page import write_report
from softmask_plugin.report.records import constant_guess, read_metrics, retrieval_chance
from softmask_plugin.report.run_report import report_run
from softmask_plugin.report.word_panels import Shown, word_panel, word_panels

__all__ = [
    "Shown",
    "constant_guess",
    "loss_curves",
    "pointing_game",
    "read_metrics",
    "report_run",
    "retrieval_chance",
    "swapped",
    "validation_curves",
    "word_panel",
    "word_panels",
    "write_report",
]

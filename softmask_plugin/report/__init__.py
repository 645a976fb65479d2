"""A run as one page to look at: curves, recalls against chance, and what its masks hid."""

from softmask_plugin.report.figures import loss_curves, validation_curves
from softmask_plugin.report.page import write_report
from softmask_plugin.report.records import constant_guess, read_metrics, retrieval_chance
from softmask_plugin.report.run_report import report_run

__all__ = [
    "constant_guess",
    "loss_curves",
    "read_metrics",
    "report_run",
    "retrieval_chance",
    "validation_curves",
    "write_report",
]

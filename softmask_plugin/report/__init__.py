"""A run as one page: curves, metrics beside chance, and pictures of its masks."""

from softmask_plugin.report.figures import loss_curves, validation_curves
from softmask_plugin.report.page import report_run, write_report
from softmask_plugin.report.records import constant_guess, read_metrics, retrieval_chance

__all__ = [
    "constant_guess",
    "loss_curves",
    "read_metrics",
    "report_run",
    "retrieval_chance",
    "validation_curves",
    "write_report",
]

"""A run as one page: curves, metrics beside chance, and pictures of its masks."""

from softmask_plugin.report.figures import loss_curves, validation_curves
from softmask_plugin.report.page import write_report
from softmask_plugin.report.records import chance_of, constant_guess, read_metrics, retrieval_chance
from softmask_plugin.report.runs import report_run, report_runs

__all__ = [
    "chance_of",
    "constant_guess",
    "loss_curves",
    "read_metrics",
    "report_run",
    "report_runs",
    "retrieval_chance",
    "validation_curves",
    "write_report",
]

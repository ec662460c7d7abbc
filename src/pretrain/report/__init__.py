"""Run reports: curves and tables as one self-contained HTML page."""

from pretrain.report.history import History, loss_svg, read_history, sort_records
from pretrain.report.run_report import fine_tuned, render, write
from pretrain.utils.curves import curve_svg

__all__ = [
    "History",
    "curve_svg",
    "fine_tuned",
    "loss_svg",
    "read_history",
    "render",
    "sort_records",
    "write",
]

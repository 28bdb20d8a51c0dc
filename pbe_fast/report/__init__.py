"""A run's results for people: a table, a figure, a page."""

from __future__ import annotations

from pbe_fast.report.figure import draw_figure
from pbe_fast.report.html import write_html
from pbe_fast.report.tables import metrics_table

__all__ = ["draw_figure", "metrics_table", "write_html"]

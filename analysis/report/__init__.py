"""The HTML report of a study: one file that needs nothing beside it."""

from analysis.report.page import write_report

__all__ = ["write_report"]

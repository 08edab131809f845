"""Reports: run directories to tables, plots and HTML pages. Reads files only; never loads a model."""

from tutelage.reports.page import write_report
from tutelage.reports.results import final_table, multistage_table, search_verdict, verdict

__all__ = ["final_table", "multistage_table", "search_verdict", "verdict", "write_report"]

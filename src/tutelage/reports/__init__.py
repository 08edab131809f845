"""Reports: run directories to tables, plots and one HTML page. Reads files only; never loads a model."""

from tutelage.reports.found import found_words
from tutelage.reports.page import write_report
from tutelage.reports.wording import final_table, verdict, workflow_table

__all__ = ["final_table", "found_words", "verdict", "workflow_table", "write_report"]

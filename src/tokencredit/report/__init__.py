"""A self-contained HTML page of training runs: results, curves, and what the credit did, token by token."""

from tokencredit.report.page import write_report
from tokencredit.report.run_page.folders import Run, load_runs

__all__ = ["Run", "load_runs", "write_report"]

"""The page of training runs: folders as data, results, curves, and responses as coloured tokens."""

from tokencredit.lazy import attributes_of

__getattr__ = attributes_of("tokencredit.report.run_page.folders")

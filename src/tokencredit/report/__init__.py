"""HTML pages that open offline: of training runs, of the benchmark and of recipe searches, from one kit.

`page` renders, escapes and writes, `plots` draws; `run_page/` and `bench_page` hold what two of the pages show.
"""

from tokencredit.lazy import lazy_attributes

__all__ = ["Run", "load_runs", "write_report"]

__getattr__ = lazy_attributes(
    "tokencredit.report", {"run_page.page": ("write_report",), "run_page.folders": ("Run", "load_runs")}
)

"""Methods side by side: `plan` plans and trains the runs, `workers` are their processes, `table` are the results."""

from tokencredit.lazy import attributes_of

__getattr__ = attributes_of("tokencredit.runs.compare.plan")

"""Evaluators of a subset: a shell command, supervised fine-tuning, n-grams, logs of past runs.

`table.py` lists them, `records.py` holds what they are asked and what they report, `history.py` the log of paid runs.
"""

from tokencredit.lazy import lazy_attributes

__getattr__ = lazy_attributes(
    "tokencredit.recipes.evaluate",
    {
        "table": ("EVALUATORS", "make_evaluator"),
        "shell": ("FIELDS", "ShellEvaluator", "read_metrics", "seconds", "write_training_files"),
        "replay": ("ReplayEvaluator", "replay_of"),
        "records": ("RESULT", "key_of"),
    },
)

"""What a step of a recipe may do, by kind: filters, dedups, draws and diverse subsets; `table.py` lists them all.

Operators are pure functions from an ordered subset to an ordered subset, none of which invents a sample. Fractions
refer to the current set, so steps do not commute. Filters keep the input order, ties go to the earlier position, and
an empty result is an error.
"""

from tokencredit.lazy import lazy_attributes

__getattr__ = lazy_attributes(
    "tokencredit.recipes.program.operators",
    {
        "table": ("OPERATORS",),
        "spec": ("OperatorSpec", "exact_ceil", "missing_default"),
        "filters": ("band", "threshold", "top", "top_tokens", "top_union"),
        "dedup": ("exact_dedup", "minhash", "semdedup"),
        "sampling": ("gumbel_k", "mix", "random_k", "stratified_k", "trajectory_k"),
        "diversity": ("diverse_top", "facility_location", "k_center", "round_robin"),
    },
)

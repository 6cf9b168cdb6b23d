"""Pipelines: steps and their hyperparameters (`steps`), their text and YAML forms (`parse`, `labels`), `assign_credit`
(`assign`) and the loader of objects that a config names (`plugins`)."""

from tokencredit.lazy import lazy_attributes

__getattr__ = lazy_attributes(
    __name__, {"pipeline": ("Pipeline", "get_pipeline"), "assign": ("assign_credit",), "steps": ("Chain", "Step")}
)

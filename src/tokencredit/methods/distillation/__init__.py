"""Distillation as credit: log-ratios to a teacher, confidence, and self-distillation with a privileged prompt."""

from tokencredit.lazy import attributes_of

__getattr__ = attributes_of("tokencredit.methods.distillation.log_ratio")

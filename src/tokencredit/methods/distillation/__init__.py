"""Distillation as credit: the log-ratio to a teacher (`log_ratio`), IW-OPD's weights (`discrepancy`), DASD (`dasd`) and
other methods with a privileged prompt (`self_distillation`)."""

from tokencredit.lazy import attributes_of

__getattr__ = attributes_of(
    "tokencredit.methods.distillation.log_ratio",
    "tokencredit.methods.distillation.discrepancy",
    "tokencredit.methods.distillation.dasd",
    "tokencredit.methods.distillation.self_distillation",
)

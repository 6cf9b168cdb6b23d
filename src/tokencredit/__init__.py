"""Credit assignment in LLM post-training: which tokens deserve the gradient?"""

from typing import TYPE_CHECKING

from tokencredit import moved
from tokencredit.lazy import lazy_attributes

if TYPE_CHECKING:
    from tokencredit.batch.records import CreditRecord, TokenBatch
    from tokencredit.errors import TokenCreditError
    from tokencredit.methods.table import ESTIMATORS, PRESETS, TRANSFORMS
    from tokencredit.pipeline.assign import assign_credit
    from tokencredit.pipeline.pipeline import Pipeline, get_pipeline

__version__ = "0.1.0"
__all__ = [
    "ESTIMATORS",
    "PRESETS",
    "TRANSFORMS",
    "CreditRecord",
    "Pipeline",
    "TokenBatch",
    "TokenCreditError",
    "assign_credit",
    "get_pipeline",
]

# Imported at first use, so that the command line answers without importing torch.
__getattr__ = lazy_attributes(
    __name__,
    {
        "pipeline.pipeline": ("Pipeline", "get_pipeline"),
        "pipeline.assign": ("assign_credit",),
        "errors": ("TokenCreditError",),
        "methods.table": ("ESTIMATORS", "PRESETS", "TRANSFORMS"),
        "batch.records": ("CreditRecord", "TokenBatch"),
    },
)
moved.install()


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

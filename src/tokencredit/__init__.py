"""Credit assignment in LLM post-training: which tokens deserve the gradient?"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokencredit.credit import Pipeline, assign_credit, get_pipeline
    from tokencredit.errors import TokenCreditError
    from tokencredit.methods import ESTIMATORS, PRESETS, TRANSFORMS
    from tokencredit.records import CreditRecord, TokenBatch

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
_HOMES = {
    "credit": ("Pipeline", "assign_credit", "get_pipeline"),
    "errors": ("TokenCreditError",),
    "methods": ("ESTIMATORS", "PRESETS", "TRANSFORMS"),
    "records": ("CreditRecord", "TokenBatch"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"tokencredit.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Credit assignment in LLM post-training: which tokens deserve the gradient?"""

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

"""TRL: `CreditGRPOTrainer`, a GRPOTrainer whose advantages come from a credit pipeline."""

from typing import TYPE_CHECKING

from tokencredit.lazy import attributes_of

if TYPE_CHECKING:
    from tokencredit.adapters.trl.trainer import CreditGRPOTrainer as CreditGRPOTrainer

__getattr__ = attributes_of("tokencredit.adapters.trl.trainer")  # TRL is imported when the trainer is asked for

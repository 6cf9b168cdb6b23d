"""verl: the plugin that `import verl` loads, in the driver and in every Ray worker (entry-point group `verl.plugins`).

Loading it registers the trainers `tokencredit_sync`, `tokencredit_colocate_async` and `tokencredit_separate_async`.
verl logs what a plugin raises at DEBUG and goes on, so nothing is raised here: a failure is kept in `FAILURE`, said on
stderr, and raised by whatever the user does next with one of those names.
"""

import importlib
import logging

from tokencredit.adapters.verl.names import MODES, PREFIX
from tokencredit.errors import TokenCreditError

FAILURE: Exception | None = None

logger = logging.getLogger(__name__)


def load() -> None:
    """Register the trainers; on failure register stand-ins that raise it."""
    global FAILURE
    FAILURE = None
    try:
        importlib.import_module("tokencredit.adapters.verl.trainer")
    except Exception as error:
        FAILURE = error
        logger.exception("tokencredit: the verl plugin did not load; `tokencredit doctor` tells more")
        _register_stand_ins()


def raise_failure() -> None:
    """The reason why the plugin did not load, if it did not."""
    if FAILURE is not None:
        raise TokenCreditError(
            f"the verl plugin of tokencredit did not load: {type(FAILURE).__name__}: {FAILURE}",
            hint="run `tokencredit doctor` in this environment; verl's default trainer needs TransferQueue",
        ) from FAILURE


def _register_stand_ins() -> None:
    try:
        base = importlib.import_module("verl.trainer.ppo.v1")
    except Exception:  # verl has no trainers here either, and says so itself
        logger.exception("tokencredit: verl's trainers cannot be imported")
        return

    def refuse(self: object, *args: object, **kwargs: object) -> None:
        raise_failure()

    for mode in MODES:
        stand_in = type("BrokenCreditTrainer", (base.PPOTrainerSync,), {"__init__": refuse})
        base.trainer_base.TRAINER_REGISTRY[f"{PREFIX}{mode}"] = stand_in


load()

"""Objects that a config names as `module:attribute`."""

import importlib
from typing import Any

from tokencredit.errors import TokenCreditError


def load_attribute(name: str, what: str) -> Any:
    """The object that `name` stands for; `what` says in the error what it was to be."""
    module, colon, attribute = name.partition(":")
    if not colon:
        raise TokenCreditError(f"{what} is module:attribute, got {name!r}")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise TokenCreditError(
            f"cannot load {what} {name!r}: {error}", hint="is the module installed, or on PYTHONPATH?"
        ) from error

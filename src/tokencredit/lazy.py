"""Attributes of a package that are imported at first use, so that importing the package stays cheap."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_attributes(package: str, homes: Mapping[str, tuple[str, ...]]) -> Callable[[str], Any]:
    """The `__getattr__` of `package`: each name comes from the submodule that `homes` lists it under."""

    def __getattr__(name: str) -> Any:
        for module, names in homes.items():
            if name in names:
                return getattr(import_module(f"{package}.{module}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__


def attributes_of(*modules: str) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose public names are those of some of its modules, the first that has one."""

    def __getattr__(name: str) -> Any:
        for module in () if name.startswith("_") else modules:
            if hasattr(import_module(module), name):
                return getattr(import_module(module), name)
        raise AttributeError(f"module {modules[0].rpartition('.')[0]!r} has no attribute {name!r}")

    return __getattr__

"""Every module of recipes can be the first that a program imports."""

import subprocess
import sys

SCRIPT = """
import importlib, pkgutil, sys
import tokencredit.recipes as package
for module in list(pkgutil.walk_packages(package.__path__, "tokencredit.recipes.")):
    for loaded in [name for name in sys.modules if name.startswith("tokencredit.recipes.")]:
        del sys.modules[loaded]
    importlib.import_module(module.name)
from tokencredit.recipes.evaluate import make_evaluator
from tokencredit.recipes.signals import compute
assert callable(compute)
from tokencredit.recipes.program.operators import OPERATORS, exact_ceil, semdedup
assert OPERATORS["semdedup"].fn is semdedup
"""


def test_any_module_may_be_imported_first() -> None:
    subprocess.run([sys.executable, "-W", "error::FutureWarning", "-c", SCRIPT], check=True)

"""What a host must keep so that its adapter works; a host that is not installed has no contract here."""

import sys
from importlib.metadata import distributions
from pathlib import Path

TESTS = Path(__file__).parent.parent
HOSTS = ("trl", "verl")
INSTALLED = [host for host in HOSTS if any(True for _ in distributions(name=host))]
collect_ignore = [f"test_{host}_contract.py" for host in HOSTS if host not in INSTALLED]

# The set-ups of the adapters' own tests; last, as tests/verl must not stand in for verl.
sys.path += [str(path) for path in (TESTS, TESTS / "support", TESTS / "verl") if str(path) not in sys.path]

"""The benchmarks' synthetic surfaces are what searches are tested on."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

"""Running kernel scripts in a process of their own: Triton chooses compiler or interpreter when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

SHARED_MEMORY = 99 * 1024  # bytes that one block may use on a consumer card; data-centre cards allow 163 KiB and more


def run(script: Path, *arguments: object, **environment: str) -> list[str]:
    """The lines that a script prints; its errors are the failure of the test."""
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        env=os.environ | {"TRITON_DEFAULT_FP_FUSION": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()

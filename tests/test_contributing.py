"""The example of CONTRIBUTING.md: a method is one file, one test and one page, and the suite takes it from there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from test_house_style import HEADINGS

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "CONTRIBUTING.md").read_text().partition("## A batch field")[0]


def test_a_method_is_one_file_and_one_test(tmp_path: Path) -> None:
    method, golden = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    source = tmp_path / "src"
    shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "tokencredit" / "methods" / "clip_credit.py").write_text(method)
    (tmp_path / "test_clip_credit.py").write_text(golden)
    tests = [str(tmp_path / "test_clip_credit.py"), "tests/test_conformance.py"]
    only = ["-k", "clip_credit or grpo_clipped", "-q", "-p", "no:cacheprovider"]
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", "pyproject.toml", "--rootdir", str(ROOT), *tests, *only],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    passed = re.search(r"(\d+) passed", process.stdout)
    assert passed and int(passed[1]) > 20, process.stdout[-500:]  # the golden test and the laws


def test_the_guide_names_the_headings_of_a_page() -> None:
    *others, last = HEADINGS
    assert f"{', '.join(others)} and {last}" in GUIDE

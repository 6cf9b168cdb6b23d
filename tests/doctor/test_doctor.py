"""`tokencredit doctor` says what a bug report needs: own version, Python, devices, optional packages, disk."""

import inspect
import json
from pathlib import Path

import pytest
from trl import GRPOTrainer

from tokencredit import __version__
from tokencredit.cli.main import main
from tokencredit.doctor.hosts import TRL_SEAMS, _methods_of_trainer


def test_what_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TOKENCREDIT_CACHE", str(tmp_path / "not/there/yet\x1b[31m"))
    assert main(["doctor", "--json", "--no-ray"]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["tokencredit"]["found"].startswith(__version__)
    assert {"Python", "CUDA", "vllm", "flash-attn", "wandb", "lab's models", "models of the hub"} <= checks.keys()
    assert checks["vllm"]["status"] in ("ok", "note")  # optional, so never to fix
    assert "GiB free" in checks["lab's models"]["found"]
    main(["doctor", "--no-ray"])
    text = capsys.readouterr().out
    assert "seam" not in text and "\x1b" not in text


def test_signatures_read_from_the_source_are_those_of_the_class() -> None:
    found = _methods_of_trainer()
    for name in TRL_SEAMS:
        assert found[name] == tuple(inspect.signature(getattr(GRPOTrainer, name)).parameters)[1:]

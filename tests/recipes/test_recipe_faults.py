"""Killed searches, refused configurations, foreign text, damaged files: nothing blocks or breaks what comes next."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from support.recipes import run_cli

from tokencredit.errors import TokenCreditError
from tokencredit.files import lock_folder
from tokencredit.recipes.evaluate.command import RUNNING, run_command
from tokencredit.recipes.evaluate.history import load_history
from tokencredit.recipes.evaluate.records import EvaluationFailed, metrics_from_json
from tokencredit.recipes.pool.ingest import canonicalise
from tokencredit.recipes.pool.lines import append, json_line, read_log
from tokencredit.recipes.pool.samples import Pool, make_pool
from tokencredit.recipes.program.recipe import load_recipe, make_recipe
from tokencredit.recipes.search.config import make_config
from tokencredit.recipes.search.objective import Objective
from tokencredit.recipes.signals.computation import Sources, compute
from tokencredit.recipes.signals.store import SIGNALS, features_key, load_materials

# writes a line ten times a second, and so does the worker that it starts
BUSY = """
import pathlib, subprocess, sys, time
log = pathlib.Path(sys.argv[1])
if len(sys.argv) == 2:
    subprocess.Popen([sys.executable, __file__, sys.argv[1] + ".worker", "worker"])
for _ in range(600):
    with log.open("a") as file:
        file.write("x")
    time.sleep(0.05)
"""
SEARCH = """
import pathlib, sys
from tokencredit.recipes.evaluate.command import run_command
folder = pathlib.Path(sys.argv[1])
run_command([sys.executable, str(folder / "busy.py"), str(folder / "beat")], folder, folder / "log.txt", 60.0)
"""


def wait_for(condition, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_a_command_ends_with_its_search_even_by_kill(tmp_path: Path) -> None:
    (tmp_path / "busy.py").write_text(BUSY)
    beats = [tmp_path / "beat", tmp_path / "beat.worker"]
    search = subprocess.Popen([sys.executable, "-c", SEARCH, str(tmp_path)])
    try:
        assert wait_for(lambda: all(beat.is_file() for beat in beats))
        with pytest.raises(TokenCreditError, match="the command of an earlier search still runs in"):
            run_command(["true"], tmp_path, tmp_path / "log.txt", 5.0)
    finally:
        os.kill(search.pid, signal.SIGKILL)
        search.wait()

    def still() -> bool:
        before = [beat.stat().st_size for beat in beats]
        time.sleep(0.5)
        return before == [beat.stat().st_size for beat in beats]

    assert wait_for(still)
    assert run_command(["true"], tmp_path, tmp_path / "log.txt", 5.0) == 0  # the folder is free again
    assert (tmp_path / RUNNING).is_file()


def test_workers_do_not_outlive_their_command(tmp_path: Path) -> None:
    (tmp_path / "busy.py").write_text(BUSY.replace("range(600)", "range(600 if sys.argv[2:] else 5)"))
    arguments = [sys.executable, str(tmp_path / "busy.py"), str(tmp_path / "beat")]
    assert run_command(arguments, tmp_path, tmp_path / "log.txt", 30.0) == 0
    time.sleep(0.2)
    worker = tmp_path / "beat.worker"
    size = worker.stat().st_size if worker.is_file() else 0
    time.sleep(0.3)
    assert (worker.stat().st_size if worker.is_file() else 0) == size


@pytest.mark.parametrize("arguments", [["/no/such/program"], ["true", "a\0b"]])
def test_a_command_that_cannot_start_is_one_line(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(TokenCreditError, match="cannot be started"):
        run_command(arguments, tmp_path, tmp_path / "log.txt", 5.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    records = [{"prompt": f"say {i}", "response": f"answer {i} " * (i % 7 + 1)} for i in range(60)]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "q.jsonl").write_text(json.dumps({"task": "t", "prompt": "say 3", "answer": "answer 3"}) + "\n")
    pool, _ = canonicalise([tmp_path / "raw.jsonl"], tmp_path / "pool")
    compute(tmp_path / "pool", pool, ["len.ws", "unigram_entropy", "hashed"], Sources())
    return tmp_path


def search_file(folder: Path, **blocks) -> Path:
    queries = {split: {"t": str(folder / "q.jsonl")} for split in ("search", "confirm")}
    content = {
        "pool": str(folder / "pool"),
        "evaluator": {"kind": "ngram", "queries": queries, "buckets": 512},
        "search": {"seed": 1, "budget": 5, "candidates": 4, "min_samples": 5, "min_token_ratio": 0.01},
        **blocks,
    }
    (folder / "s.yaml").write_text(yaml.safe_dump(content))
    return folder / "s.yaml"


def test_a_refused_search_blocks_nothing(folder: Path) -> None:
    bad = {"kind": "ngram", "queries": {"search": {"t": str(folder / "missing.jsonl")}}}
    with pytest.raises(TokenCreditError, match="no query file"):
        run_cli("search", search_file(folder, evaluator=bad), "--out", folder / "run")
    assert not (folder / "run" / "search.yaml").exists()
    assert run_cli("search", search_file(folder), "--out", folder / "run") == 0
    small = {"seed": 1, "budget": 5}
    with pytest.raises(TokenCreditError, match=r"the pool has 60 samples.*`search.min_samples`, 500") as caught:
        run_cli("search", search_file(folder, search=small), "--out", folder / "other")
    assert "min_samples: 3" in str(caught.value.hint)


def test_a_configuration_without_evaluations_is_replaced(folder: Path) -> None:
    from tokencredit.recipes.search.config import load_config
    from tokencredit.recipes.search.runs import save_config

    first = load_config(search_file(folder))
    save_config(first, folder / "run")
    other = load_config(search_file(folder), {"seed": 9})
    save_config(other, folder / "run")
    assert load_config(folder / "run" / "search.yaml") == other
    append(folder / "run" / "history.jsonl", json_line({"slot": 1}))
    with pytest.raises(TokenCreditError):
        save_config(first, folder / "run")


def test_two_commands_do_not_write_one_folder(folder: Path) -> None:
    held = f"in use by another process .pid {os.getpid()}"
    with lock_folder(folder / "run"), pytest.raises(TokenCreditError, match=held):
        run_cli("search", search_file(folder), "--out", folder / "run")
    with lock_folder(folder / "pool"), pytest.raises(TokenCreditError, match=held):
        run_cli("signals", folder / "pool", "--out", folder / "pool")
    assert run_cli("signals", folder / "pool", "--out", folder / "pool") == 0


def test_a_reader_does_not_cut_the_log_of_a_writer(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    append(path, json_line({"a": 1}))
    with path.open("ab") as file:
        file.write(b'{"a": 2, "tor')
    torn = path.read_bytes()
    assert list(read_log(path)) == [{"a": 1}] and path.read_bytes() == torn
    append(path, json_line({"a": "\ud800"}))  # the writer cuts the tail off
    assert list(read_log(path)) == [{"a": 1}, {"a": "\ud800"}]
    for content in (b"\xff\xfe\n", b"[" * 100_000 + b"\n", b"[]\n", b'{"slot": 1}\n'):
        path.write_bytes(content)
        with pytest.raises(TokenCreditError, match="history"):
            load_history(tmp_path)


def test_inputs_are_checked_before_the_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokencredit.recipes.signals import computation as signals

    def passed(*arguments, **options):
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr(signals, "load_scorer", passed)
    pool = load_materials(folder / "pool").pool
    (folder / "bad.jsonl").write_text('{"nothing": 1}\n')
    for sources, message in (
        (Sources(model="m", queries={"t": folder / "no.jsonl"}), "no query file"),
        (Sources(model="m", queries={"t": folder / "bad.jsonl"}), r"bad\.jsonl:1: no messages"),
        (Sources(model="m", queries={"t": folder / "q.jsonl"}, splits=[folder / "no"]), "no file of problems"),
        (Sources(model="m"), "relevance needs queries"),
        (Sources(model="m", query_embeddings={"t": folder / "no.npy"}), r"no\.npy is not a file"),
    ):
        with pytest.raises(TokenCreditError, match=message):
            compute(folder / "pool", pool, ["ppl", "rds", "rel"], sources)


@pytest.mark.parametrize("content", [b"", b"\0" * 400, b'{"key": '])
def test_damaged_columns_are_computed_again(folder: Path, content: bytes) -> None:
    pool = load_materials(folder / "pool").pool
    base = folder / "pool" / SIGNALS
    wanted = load_materials(folder / "pool").column("unigram_entropy").copy()
    (base / "unigram_entropy.arrow").write_bytes(content)
    (base / "features.json").write_bytes(content)
    assert load_materials(folder / "pool").features is None and features_key(folder / "pool") is None
    with pytest.raises(TokenCreditError, match="damaged or cut off"):
        load_materials(folder / "pool").column("unigram_entropy")
    assert compute(folder / "pool", pool, ["unigram_entropy", "hashed"], Sources()) == ["unigram_entropy"]
    np.testing.assert_array_equal(load_materials(folder / "pool").column("unigram_entropy"), wanted)
    (base / "features.npy").write_bytes(content)
    with pytest.raises(TokenCreditError, match=r"features\.npy cannot be read"):
        load_materials(folder / "pool")


SPELLINGS = (
    "steps: [{op: top, signal: len.ws, fraction: 5e-1}, {op: exact_dedup}]",
    "steps:\n- {top: {signal: len.ws, fraction: .5}}\n- exact_dedup",
    "- {top: {signal: len.ws, fraction: 0.5}}\n- {exact_dedup: }",
    "recipe: {id: r}\nsteps: [{top: {signal: len.ws, fraction: 0.50}}, {exact_dedup: {}}]",
)


def test_a_recipe_may_be_spelled_as_credit_is(tmp_path: Path) -> None:
    wanted = make_recipe([{"op": "top", "signal": "len.ws", "fraction": 0.5}, {"op": "exact_dedup"}]).steps
    for text in SPELLINGS:
        (tmp_path / "r.yaml").write_text(text)
        assert load_recipe(tmp_path / "r.yaml")[0].steps == wanted


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe",
        b"steps: [",
        b"steps: " + b"[" * 3000,
        b"steps: [{1: 2}]",
        b"steps: [{top: 3}]",
        b"steps: [{op: top, signal: [a], fraction: .5}]",
        b"steps: [{op: threshold, signal: a, value: .nan}]",
        b"steps: [{op: semdedup, cosine: .9, keep: [1]}]",
        b"recipe: 3\nsteps: []",
        b"steps: [{op: random_k, k: " + b"9" * 5000 + b", seed: 1}]",
    ],
)
def test_a_bad_recipe_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(TokenCreditError) as caught:
        load_recipe(tmp_path / "r.yaml")
    assert "\n" not in caught.value.message
    with pytest.raises(TokenCreditError):
        load_recipe(tmp_path)  # a folder


BASE = {"pool": "p", "evaluator": {"kind": "ngram"}, "search": {"seed": 1}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"search": "fast"}, "`search` must be a mapping"),
        ({"pool": ["a"]}, "`pool` must be the path of a pool folder"),
        ({"search": {"seed": 1, "budget": [3]}}, r"`search.budget` must be a whole number of at least 1, got \[3\]"),
        ({"search": {"seed": 1, "operators": [["top"]]}}, "`search.operators` must be a name or a list of names"),
        ({"search": {"seed": 1, "min_token_ratio": 2.0}}, "min_token_ratio"),
        ({"confirm": {"controls": ["best_singel"]}}, "did you mean 'best_single'"),
        ({"confirm": {"seeds": 0}}, "`confirm.seeds` must be a whole number of at least 1"),
        ({"objective": {"tasks": ["a"]}}, "must be a mapping from task"),
        (
            {"objective": {"tasks": {"a": {"weight": "much"}}}},
            "task a of the objective: `objective.tasks.weight` must",
        ),
        ({"objective": {"noise_sd": "x"}}, "`objective.noise_sd` must be a number"),
        ({"llm": {"roles": ["rank"]}}, "`llm` needs `model`"),
    ],
)
def test_a_search_file_is_typed(change: dict, message: str) -> None:
    with pytest.raises(TokenCreditError, match=message):
        make_config({**BASE, **change})


def test_metrics_of_any_kind_fail_one_evaluation() -> None:
    for score in (10**400, float("inf"), "0.5", None, True, [1]):
        with pytest.raises(EvaluationFailed, match="must be a finite number"):
            metrics_from_json({"tasks": {"t": {"score": score}}})
    with pytest.raises(EvaluationFailed, match="must be whole numbers"):
        metrics_from_json({"tasks": {"t": {"score": 0.5, "n": "many"}}})
    assert metrics_from_json({"tasks": {"t": {"score": 1}}, "train": [1]}).tasks["t"].score == 1.0
    with pytest.raises(TokenCreditError, match="weights of the tasks of the objective are all 0"):
        Objective.read({"tasks": {"a": {"weight": 0}}})


def test_foreign_text_reaches_the_terminal_as_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = "print('[/b] [/data/x.jsonl] \\x1b[31mred'); raise SystemExit(3)"
    evaluator = {"kind": "shell", "command": [sys.executable, "-c", script], "timeout": "30s"}
    settings = {"seed": 1, "budget": 2, "policy": "random", "min_samples": 5, "min_token_ratio": 0.01}
    code = run_cli("search", search_file(folder, evaluator=evaluator, search=settings), "--out", folder / "run")
    printed = capsys.readouterr()
    assert code == 3 and "\x1b" not in printed.out + printed.err
    assert "[/b] [/data/x.jsonl] \\x1b[31mred" in printed.err
    assert [e.reason for e in load_history(folder / "run")] == ["exit status 3: [/b] [/data/x.jsonl] \x1b[31mred"] * 2


def test_a_dollar_in_a_name_is_text_in_the_pictures() -> None:
    from tokencredit.recipes.report import _draw_forest, _draw_funnel, _picture

    rows = [{"control": r"cost $\frac{1", "low": -1.0, "high": 1.0, "mean": 0.0}]
    assert r"cost $\frac{1" in _picture("forest", _draw_forest, rows, {})
    funnel = [{"op": "$x^", "samples": 3}]
    assert "$x^" in _picture("funnel", _draw_funnel, funnel, {"pool": {"samples": 9}})


def test_a_pool_of_no_folder_has_no_model() -> None:
    from tokencredit.recipes.signals.store import model_of

    pool: Pool = make_pool([1], ["s"], [1])
    assert model_of(pool.folder) is None

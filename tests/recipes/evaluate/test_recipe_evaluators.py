import http.server
import json
import sys
import threading
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from recipes_surfaces import SyntheticEvaluator, surface, synthetic_pool
from support.recipes import run_cli

from tokencredit.errors import TokenCreditError
from tokencredit.lab.model import build_model, build_tokenizer
from tokencredit.recipes.evaluate.records import EvaluationFailed, Request, metrics_from_json
from tokencredit.recipes.evaluate.shell import seconds
from tokencredit.recipes.evaluate.table import make_evaluator
from tokencredit.recipes.pool.ingest import canonicalise
from tokencredit.recipes.pool.samples import Pool
from tokencredit.recipes.search.config import LLMSettings, make_config
from tokencredit.recipes.search.llm import Adviser, _json_in
from tokencredit.recipes.search.loop import Search

WORDS = ["alpha", "beta", "gamma", "delta", "omega"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    lines = [
        {"prompt": f"say {i}", "response": " ".join(rng.choice(WORDS, int(rng.integers(3, 12)))), "source": "ab"[i % 2]}
        for i in range(60)
    ]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    canonicalise([tmp_path / "raw.jsonl"], tmp_path / "pool")
    return tmp_path


def request_of(pool: Pool, folder: Path, *, k: int = 20, seed: int = 1, split: str = "search") -> Request:
    positions = np.arange(k, dtype=np.int32)
    return Request(
        positions=positions, subset_hash=pool.subset_hash(positions), seed=seed, split=split, folder=folder, recipe="r"
    )


SCRIPT = """
import json, pathlib, sys
train, out, seed, mode = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
calls = out.parent / "calls"
calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
if mode == "fail" or (mode == "once" and len(calls.read_text()) == 1):
    sys.exit("no memory left")
if mode == "hang":
    import time; time.sleep(60)
lines = pathlib.Path(train).read_text().splitlines()
score = float("nan") if mode == "nan" else len(lines) / 60
(out / "metrics.json").write_text(json.dumps({"tasks": {"t": {"score": score, "n": 2}}, "items": "items.jsonl"}))
items = [{"task": "t", "item": i, "score": score} for i in range(2)]
(out / "items.jsonl").write_text("".join(json.dumps(i) + chr(10) for i in items))
"""


def shell(folder: Path, mode: str, timeout: str = "30s"):
    from tokencredit.recipes.pool.samples import load_pool

    (folder / "train.py").write_text(SCRIPT)
    command = [sys.executable, str(folder / "train.py"), "{train_file}", "{out_dir}", "{seed}", mode]
    pool = load_pool(folder / "pool")
    return make_evaluator({"kind": "shell", "command": command, "timeout": timeout}, pool), pool


def test_a_shell_run_is_paid_once(folder: Path) -> None:
    evaluator, pool = shell(folder, "fine")
    request = request_of(pool, folder / "runs" / "one")
    metrics = evaluator(request)
    assert metrics.tasks["t"].score == pytest.approx(20 / 60)
    assert metrics.items == {("t", "0"): 20 / 60, ("t", "1"): 20 / 60}
    assert evaluator(request) == metrics
    assert (folder / "runs" / "calls").read_text() == "x"
    assert len((request.folder / "train.ids").read_text().splitlines()) == 20
    assert json.loads((request.folder / "train.jsonl").read_text().splitlines()[0])["messages"][0]["content"] == "say 0"


def test_a_shell_run_is_retried_once(folder: Path) -> None:
    evaluator, pool = shell(folder, "once")
    assert evaluator(request_of(pool, folder / "runs" / "one")).tasks["t"].n == 2
    assert (folder / "runs" / "calls").read_text() == "xx"


@pytest.mark.parametrize(
    ("mode", "reason"),
    [("fail", "exit status 1: no memory left"), ("nan", "must be a finite number"), ("hang", "no result after")],
)
def test_a_shell_run_fails_with_its_reason(folder: Path, mode: str, reason: str) -> None:
    evaluator, pool = shell(folder, mode, timeout="1s" if mode == "hang" else "30s")
    with pytest.raises(EvaluationFailed, match=reason):
        evaluator(request_of(pool, folder / "runs" / "one"))


def test_evaluator_files_are_checked(folder: Path) -> None:
    from tokencredit.recipes.pool.samples import load_pool

    pool = load_pool(folder / "pool")
    cases = [
        ({"kind": "shel"}, "unknown evaluator 'shel', did you mean 'shell'"),
        ({"kind": "shell", "command": "python x"}, "must be a list of arguments"),
        ({"kind": "shell", "command": ["x", "{train}"]}, "unknown field of `evaluator.command` 'train'"),
        ({"kind": "shell", "command": ["x"], "timeout": "soon"}, "must be like 90s"),
        ({"kind": "shell", "command": ["x"], "tiemout": "1h"}, "unknown key of evaluator 'shell' 'tiemout'"),
        ({"kind": "sft", "model": "m"}, "needs `splits`"),
        ({"kind": "ngram"}, "needs `queries`"),
    ]
    for config, message in cases:
        with pytest.raises(TokenCreditError, match=message):
            make_evaluator(config, pool)
    assert [seconds(text) for text in (90, "90s", "1.5m", "2h")] == [90, 90, 90, 7200]
    with pytest.raises(EvaluationFailed, match="must hold `tasks`"):
        metrics_from_json({"tasks": {}})


def test_ngram_prefers_data_like_its_queries(folder: Path) -> None:
    from tokencredit.recipes.pool.samples import load_pool

    (folder / "q.jsonl").write_text(json.dumps({"text": "alpha beta gamma delta omega"}) + "\n")
    queries = {split: {"words": str(folder / "q.jsonl")} for split in ("search", "confirm")}
    pool = load_pool(folder / "pool")
    evaluator = make_evaluator({"kind": "ngram", "queries": queries, "buckets": 4096}, pool)
    much, little = (evaluator(request_of(pool, folder, k=k)).tasks["words"].score for k in (60, 1))
    # ln 5 = 1.61 nats is what a uniform model of the five words reaches
    assert -1.9 < much < -1.3 and little < much
    other = evaluator(request_of(pool, folder, k=60, seed=2)).tasks["words"].score
    assert other != much and abs(other - much) < 0.2


def test_sft_really_trains(folder: Path) -> None:
    from tokencredit.recipes.pool.samples import load_pool

    tokenizer = build_tokenizer("abcdefghijklmnopqrstuvwxyz0123456789 ")
    build_model(tokenizer, layers=1, width=32, heads=2, seed=0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = [{"prompt": f"say {w}", "response": f"{w[0]}"} for w in WORDS for _ in range(12)]
    (folder / "easy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    canonicalise([folder / "easy.jsonl"], folder / "easy")
    for split, words in (("search", WORDS[:3]), ("confirm", WORDS[3:])):
        problems = [{"task": "first", "prompt": f"say {w}", "answer": w[0]} for w in words]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    splits = {split: str(folder / f"{split}.jsonl") for split in ("search", "confirm")}
    pool = load_pool(folder / "easy")
    config = {"kind": "sft", "model": str(folder / "model"), "splits": splits, "batch_size": 8, "max_new_tokens": 4}
    config |= {"learning_rate": 1e-2, "max_length": 32}
    trained = make_evaluator({**config, "steps": 60}, pool)(request_of(pool, folder / "a", k=60))
    untrained = make_evaluator({**config, "steps": 1}, pool)(request_of(pool, folder / "b", k=60))
    assert trained.tasks["first"].score == 1.0 > untrained.tasks["first"].score
    assert len(trained.items) == 3 and trained.train["steps"] == 60
    again = make_evaluator({**config, "steps": 60}, pool)
    assert again(request_of(pool, folder / "a", k=60)).tasks == trained.tasks
    with pytest.raises(TokenCreditError, match="share the problem 'say alpha'"):
        make_evaluator({**config, "splits": {"search": splits["search"], "confirm": splits["search"]}}, pool)


class Answers(http.server.BaseHTTPRequestHandler):
    """Always the same proposals; a reversed ranking in slot 5, nonsense in slot 6."""

    seen: ClassVar[list[dict]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(body)
        facts = json.loads(body["messages"][1]["content"])
        if "candidates" not in facts:
            reply = f"<think>[1, 2]</think>```json\n{PROPOSAL}\n```"
        elif facts["slot"] == 5:
            reply = json.dumps([*reversed(range(len(facts["candidates"])))])
        else:
            reply = "[0, 0, 1]" if body["temperature"] > 0.5 else "no idea"
        content = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None: ...


def searched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Search, list[dict]]:
    handler = type("Handler", (Answers,), {"seen": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    pool = synthetic_pool(600)
    search_block = {"seed": 1, "budget": 6, "candidates": 4, "min_samples": 20}
    content = {"pool": "p", "evaluator": {"kind": "synthetic"}, "objective": {"scale": 1.0}, "search": search_block}
    search = Search(
        config=make_config(content),
        materials=pool.materials,
        evaluator=SyntheticEvaluator(pool=pool, surface=surface("mono")),
        folder=folder,
        adviser=Adviser(settings=LLMSettings(model="m"), folder=folder),
    )
    try:
        search.run()
    finally:
        server.shutdown()
        server.server_close()
    return search, handler.seen


PROPOSAL = json.dumps(
    [
        [{"op": "top", "signal": "ifd", "fraction": 0.61}],
        [{"op": "semdedup", "cosine": 1.7}, {"op": "random_k", "k": 400, "seed": 3}],
        [{"op": "delete_everything"}],
    ]
)


def test_a_language_model_joins_and_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search, seen = searched(tmp_path, monkeypatch)
    counts = search.adviser.counts
    # slot 5: proposals and a ranking; slot 6: proposals, a ranking with a repeat, and no answer to the retry
    assert len(seen) == counts["asked"] == 5
    assert counts["dropped"] == 2 and counts["clamped"] == 2
    assert counts["fallback"] == 1 and counts["bad_answers"] == 2
    steps = [json.loads(line)["steps"] for line in (tmp_path / "candidates.jsonl").read_text().splitlines()]
    assert [{"op": "top", "signal": "ifd", "fraction": 0.61}] in steps
    assert any(step == {"op": "semdedup", "cosine": 0.99} for program in steps for step in program)
    assert "samples" not in json.loads(seen[0]["messages"][1]["content"])
    # resume and replay need no network
    (tmp_path / "history.jsonl").write_text("")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    again = Search(
        config=search.config,
        materials=synthetic_pool(600).materials,
        evaluator=search.evaluator,
        folder=tmp_path,
        adviser=Adviser(settings=LLMSettings(model="m"), folder=tmp_path),
    )
    again.run()
    assert [e.subset_hash for e in again.history] == [e.subset_hash for e in search.history]
    assert again.adviser.counts.get("asked", 0) == 0


def test_json_is_found_in_an_answer() -> None:
    assert _json_in('Sure! {"a": [1]} done') == {"a": [1]}
    assert _json_in("<think>[0]</think> [2, 1]") == [2, 1]


def test_commands_end_to_end(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    pool = folder / "made"
    assert (
        run_cli("signals", folder / "raw.jsonl", "--out", pool, "--signals", "len.ws,unigram_entropy,hashed", "--json")
        == 0
    )
    assert json.loads(capsys.readouterr().out)["samples"] == 60
    recipe = folder / "r.yaml"
    recipe.write_text("steps:\n- {op: top, signal: len.ws, fraction: 0.5}\n- {op: random_k, k: 20, seed: 1}\n")
    assert run_cli("run", recipe, "--pool", pool, "--trace", "--out", folder / "data") == 0
    printed = capsys.readouterr().out
    assert "20 of 60 samples" in printed and "top" in printed
    assert len((folder / "data" / "train.jsonl").read_text().splitlines()) == 20
    (folder / "train.py").write_text(SCRIPT)
    command = [sys.executable, str(folder / "train.py"), "{train_file}", "{out_dir}", "{seed}", "fine"]
    config = {
        "pool": str(pool),
        "evaluator": {"kind": "shell", "command": command},
        "search": {"budget": 5, "candidates": 4, "min_samples": 5, "seed": 1},
    }
    (folder / "s.yaml").write_text(yaml.safe_dump(config))
    out = folder / "run"
    assert run_cli("search", folder / "s.yaml", "--out", out, "--dry-run") == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert run_cli("search", folder / "s.yaml", "--out", out) == 0
    assert "finalist: slot" in capsys.readouterr().out
    history = (out / "history.jsonl").read_bytes()
    assert run_cli("search", folder / "s.yaml", "--out", out) == 0  # the same command pays for nothing twice
    assert (out / "history.jsonl").read_bytes() == history and "finalist: slot" in capsys.readouterr().out
    with pytest.raises(TokenCreditError, match="holds no search to go on with"):
        run_cli("search", folder / "s.yaml", "--out", folder / "new", "--resume")
    with pytest.raises(TokenCreditError, match="started with another configuration"):
        run_cli("search", folder / "s.yaml", "--out", out, "--resume", "--seed", "2")
    assert run_cli("search", folder / "s.yaml", "--out", out, "--resume", "--budget", "6", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["history"]) == 6
    assert run_cli("confirm", out, "--seeds", "2") == 0
    assert "confirmed mean" in capsys.readouterr().out
    assert run_cli("report", out) == 0
    assert "finalist" in capsys.readouterr().out and (out / "report.html").is_file()
    for name, files in (("trl", 2), ("llamafactory", 2), ("axolotl", 2), ("ids", 1)):
        assert run_cli("export", out, "--format", name, "--out", folder / name, "--json") == 0
        paths = json.loads(capsys.readouterr().out)["files"]
        assert len(paths) == files and all(Path(path).is_file() for path in paths)
    compile((folder / "trl" / "train_trl.py").read_text(), "train_trl.py", "exec")
    info = json.loads((folder / "llamafactory" / "dataset_info.json").read_text())
    assert info["recipe"]["file_name"] == "train.jsonl"
    assert yaml.safe_load((folder / "axolotl" / "axolotl.yaml").read_text())["datasets"][0]["path"] == "train.jsonl"


def test_commands_refuse_what_they_cannot_do(folder: Path) -> None:
    with pytest.raises(TokenCreditError, match="is not a run folder"):
        run_cli("report", folder)
    with pytest.raises(TokenCreditError, match="needs --pool"):
        run_cli("export", folder / "r.yaml", "--out", folder / "x")
    with pytest.raises(TokenCreditError, match="--queries must be NAME=FILE, got 'gsm8k'"):
        run_cli("signals", folder / "raw.jsonl", "--out", folder / "p", "--queries", "gsm8k")

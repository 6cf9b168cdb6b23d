"""The page: one file, nothing from outside, every text escaped, whatever the runs lack."""

import argparse
import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support import sample_runs

import tokencredit
from tokencredit.cli import report as cli
from tokencredit.errors import TokenCreditError
from tokencredit.report import plots, write_report
from tokencredit.report.plots import Curve
from tokencredit.report.run_page.folders import Run
from tokencredit.report.run_page.page import _title

VOID = {"meta", "wbr", "br", "link", "img", "input", "hr"}
# Each is one token, and the label, task, model, status and settings of its run.
HOSTILE = ("<script>alert(1)</script>{{ 7*7 }}\ud83d", '"><img src=x onerror=alert(1)>\x00\x08\x1b\u202e')


class Page(HTMLParser):
    """Elements, ids, text and whether every tag closes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def of(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes in self.tags if name == tag)


def page(path: Path) -> Page:
    parsed = Page(path.read_text(encoding="utf-8"))
    assert parsed.open == []
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [str(a["href"])[1:] for a in parsed.of("a")]
    assert set(targets) <= set(ids)
    return parsed


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    names = []
    for label in ("grpo", "hapo"):
        for seed in range(2):
            names.append(f"{label}/seed-{seed}")
            sample_runs.write_run(folder / names[-1], label, seed, steps=40, every=5)
    (folder / "compare.json").write_text(json.dumps({"runs": names}))
    return folder


@pytest.fixture(scope="module")
def whole(comparison: Path) -> Page:
    return page(write_report([comparison], comparison / "report.html"))


def test_every_section_is_there(whole: Page) -> None:
    sections = [attributes.get("id") for attributes in whole.of("section") if "id" in attributes]
    expected = ["results", "training", "quadrants", "concentration", "position", "histograms", "responses", "settings"]
    assert sections == expected
    assert sum(1 for _ in whole.of("figure")) == 4 + 2 * 3 + 4 + 2 + 2
    text = " ".join("".join(whole.text).split())
    assert "difference to grpo" in text and "entropy_capacity(" in text and "learning_rate" in text


def test_nothing_comes_from_outside(comparison: Path, whole: Page) -> None:
    text = (comparison / "report.html").read_text(encoding="utf-8")
    addresses = set(re.findall(r"(?:https?:)?//[\w.]+[^\s\"'<>)]*", re.sub(r"(?m)^\s*//.*$", "", text)))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    loads = [tag for tag, attributes in whole.tags if "src" in attributes or tag in ("link", "img", "iframe", "object")]
    assert loads == []
    assert any(a.get("http-equiv") == "Content-Security-Policy" for a in whole.of("meta"))


def test_tokens_carry_what_hovering_shows(whole: Page) -> None:
    tokens = [a for a in whole.of("span") if "t" in str(a.get("class")).split() and "data-a" in a]
    assert len(tokens) > 100
    assert {str(a["data-q"]) for a in tokens if "data-q" in a} == {"PHR", "PLR", "NHR", "NLR"}
    assert all(float(str(a["data-h"])) >= 0 for a in tokens)
    up = [a for a in tokens if "u" in str(a["class"]).split()]
    assert up and not any(str(a["data-a"]).startswith("−") for a in up)
    responses = [a for tag, a in whole.tags if tag == "div" and a.get("class") == "tokens"]
    assert len(responses) == sum("tabindex" in a for a in whole.of("span"))


def test_hostile_text_stays_text(tmp_path: Path, whole: Page) -> None:
    paths = []
    for number, hostile in enumerate(HOSTILE):
        label = f"{hostile}$x^2$"
        changes = {"label": label, "task": hostile, "model": hostile, "settings": {hostile: hostile}, "status": hostile}
        paths.append(
            sample_runs.write_run(tmp_path / str(number), "hapo", number, steps=0, hostile=hostile, changes=changes)
        )
    out = write_report(paths, tmp_path / "report.html")
    parsed = page(out)
    plain = {tag for tag, _ in whole.tags}
    assert {tag for tag, _ in parsed.tags} <= plain  # no <img>, nothing that a normal report lacks
    assert sum(1 for _ in parsed.of("script")) == 1
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    text = "".join(parsed.text)
    for shown in (
        "<script>alert(1)</script>",
        '"><img·src=x·onerror=alert(1)>',
        "{{·7*7·}}",
        "⟨U+D83D⟩",
        "⟨U+0000⟩⟨U+0008⟩⟨U+001B⟩",
        "⟨U+202E⟩",
    ):
        assert shown in text, shown
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", out.read_text(encoding="utf-8"))


def test_what_is_missing_is_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"label": "bare", "status": "running"}))
    parsed = page(write_report([folder], tmp_path / "a.html"))
    assert [a.get("id") for a in parsed.of("section")] == ["results", "settings"]
    assert "Nothing was evaluated" in "".join(parsed.text) and "is running" in "".join(parsed.text)
    lines = [
        {"step": 3, "kind": "eval", "metrics": {"success": 0.5}},
        {"step": 3, "kind": "train", "metrics": {"loss": 1}},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    parsed = page(write_report([folder], tmp_path / "b.html"))
    assert [a.get("id") for a in parsed.of("section")] == ["results", "training", "settings"]


def test_credit_curves_from_records_where_nothing_was_logged(tmp_path: Path) -> None:
    folder = sample_runs.write_run(tmp_path / "run", "hapo", 0, steps=25, every=25)
    (folder / "metrics.jsonl").unlink()
    parsed = page(write_report([folder], tmp_path / "report.html"))
    sections = [a.get("id") for a in parsed.of("section") if "id" in a]
    assert "quadrants" in sections and "concentration" in sections and "training" not in sections


def test_a_comparison_that_waits(tmp_path: Path) -> None:
    (tmp_path / "compare.json").write_text(json.dumps({"runs": ["grpo/seed-0", "hapo/seed-0"]}))
    text = "".join(page(write_report([tmp_path], tmp_path / "report.html")).text)
    assert "2 not started" in text


def run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    args = parser.parse_args(["report", *arguments])
    return int(args.handler(args))


def test_command_line(comparison: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "page.html"
    assert run([str(comparison), "--out", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["report"] == str(out) and out.exists()
    assert [row["label"] for row in printed["results"]] == ["grpo", "hapo"]
    assert printed["results"][1]["paired_seeds"] == 2
    assert not list(out.parent.glob("*.tmp"))


def test_default_place_is_the_first_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = sample_runs.write_run(tmp_path / "run", "grpo", 0, steps=0)
    assert run([str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")


def test_bad_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenCreditError, match=r"holds none of run\.json, compare\.json"):
        run([str(tmp_path)])
    folder = sample_runs.write_run(tmp_path / "run", "grpo", 0, steps=0)
    with pytest.raises(TokenCreditError, match="is a folder"):
        write_report([folder], tmp_path)


def test_a_title_that_would_be_a_paragraph_counts_the_methods() -> None:
    names = ["grpo", "hapo", "group_normalized → attention_schedule(direction=high_to_low)"]
    runs = [Run(folder=Path(name), name=name, label=name, task="countdown") for name in names]
    assert _title(runs[:2]) == "grpo, hapo on countdown"
    assert _title(runs) == "3 methods on countdown"


def test_every_page_forbids_loading_anything() -> None:
    pages = sorted(Path(tokencredit.__file__).parent.rglob("templates/*.html"))
    frame = next(path for path in pages if path.name == "page.html")
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\';' in frame.read_text()
    framed = [path.name for path in pages if path.read_text().startswith('{% extends "page.html" %}')]
    assert framed == ["recipes.html", "bench.html", "run.html"]
    assert {path.name for path in pages} - set(framed) == {"page.html", "table.html", "audit.html"}
    audit = next(
        path for path in pages if path.name == "audit.html"
    )  # a frame of its own, as its script draws the page
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\';' in audit.read_text()


def test_axes_show_numbers_in_full() -> None:
    curve = Curve("a", [0.0, 1.0, 2.0], [0.9996, 1.0, 1.0004], [math.nan] * 3, [math.nan] * 3)
    svg = plots.curves("x", [curve], {"a": plots.style(0)})
    numbers = re.findall(r">(\d[\d.]*)</text>", svg)
    assert "1.0000" in numbers and "0.9996" in numbers
    assert plots._tick(2.5e-7, step=5e-8, largest=3e-7) == "2.5e−07"
    assert plots._tick(-0.25, step=0.25, largest=1.0) == "−0.25"
    assert plots._tick(1500.0, step=500.0, largest=2000.0) == "1500"


def test_an_evaluation_that_is_no_share_is_a_mean_reward(tmp_path: Path) -> None:
    folder = tmp_path / "shaped"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"label": "shaped", "seed": 0}))
    lines = [
        {"step": step, "kind": "eval", "metrics": metrics}
        for step, metrics in ((0, {"success": 0.1}), (5, {"success": 1.8, "per_problem": [1.0, 2.6]}))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = "".join(page(write_report([folder], tmp_path / "a.html")).text)
    assert "Mean reward on held-out problems" in text and "1.8" in text
    assert "180" not in text and "in %" not in text
    said = {"reward": 0.5, "success": 1.0, "per_problem": [0.5, 0.5], "binary": False, "threshold": 0.2}
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 0, "kind": "eval", "metrics": said}) + "\n")
    text = "".join(page(write_report([folder], tmp_path / "b.html")).text)
    assert "Mean reward on held-out problems" in text and "above the reward threshold" in text

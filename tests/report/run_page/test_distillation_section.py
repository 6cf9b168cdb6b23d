"""The section on distillation: who has it, what its pictures show, and that runs without a teacher lack it."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from support import sample_runs

from tokencredit.report import plots, write_report
from tokencredit.report.run_page.data import PageData
from tokencredit.report.run_page.distillation import _profiles, adds_bonus, distillation_pictures
from tokencredit.report.run_page.folders import Run, load_runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    root = tmp_path_factory.mktemp("runs")
    labels = ("grpo", "opd", "dasd", "dasd_permuted")
    return load_runs([sample_runs.write_run(root / label, label, 0, steps=20, every=2) for label in labels])


def drawn(runs: list[Run]) -> dict[str, str]:
    return {picture.title: picture.svg for picture in distillation_pictures(PageData.of(runs))}


def test_pictures_of_runs_with_a_teacher(runs: list[Run]) -> None:
    found = drawn(runs)
    assert list(found) == [
        "Gap to the teacher",
        "Share of the gap up front",
        "Distance from position",
        "Gap by position, first steps",
        "Gap by position, last steps",
        "Router mass",
        "dasd",
        "dasd_permuted",
    ]
    # One line a method with a teacher; the router twice, for each method that adds a bonus.
    colours = {run.label: plots.style(number).variable for number, run in enumerate(runs)}
    assert colours["opd"] in found["Gap to the teacher"] and colours["grpo"] not in found["Gap to the teacher"]
    assert colours["dasd"] in found["Router mass"] and colours["opd"] not in found["Router mass"]
    for quadrant in plots.QUADRANT_COLOURS:
        assert f"var(--{quadrant.lower()})" in found["dasd"]


def test_profiles_rise_where_the_teacher_disagrees_and_fall_in_training(runs: list[Run]) -> None:
    assert "position in the response, %" in drawn(runs)["Gap by position, last steps"]
    first, last = (_profiles(PageData.of(runs), last=side) for side in (False, True))
    assert set(first) == {"opd", "dasd", "dasd_permuted"}
    assert first["opd"][9] > 2.0 * first["opd"][0]
    assert sum(last["opd"]) < sum(first["opd"])


def test_only_pipelines_that_add_to_the_verifier_have_a_bonus(runs: list[Run]) -> None:
    assert {run.label: adds_bonus(run) for run in runs} == {
        "grpo": False, "opd": False, "dasd": True, "dasd_permuted": True,
    }  # fmt: skip
    assert not adds_bonus(replace(runs[0], pipeline=None))


def test_the_section_is_in_the_page_and_only_where_there_is_a_teacher(runs: list[Run], tmp_path: Path) -> None:
    page = write_report([run.folder for run in runs], tmp_path / "report.html").read_text()
    assert 'href="#distillation"' in page and page.count('<section id="distillation">') == 1
    assert len(re.findall("<figure", page[page.index('id="distillation"') : page.index('id="position"')])) == 8
    plain = write_report([runs[0].folder], tmp_path / "plain.html").read_text()
    assert "distillation" not in plain


def test_numbers_come_from_the_records_where_nothing_was_logged(runs: list[Run]) -> None:
    assert "Router mass" in drawn([replace(run, lines=()) for run in runs])

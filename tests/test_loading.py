"""Names in a config: where modules and files are found, and what each error tells."""

import sys
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest

from tokencredit.errors import TokenCreditError
from tokencredit.pipeline import plugins as loading
from tokencredit.pipeline.plugins import add_search_folder, load_attribute, load_function


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, empty; what a test imports from it is forgotten afterwards."""
    before = set(sys.modules)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(loading, "_FOLDERS", [])
    yield tmp_path / "here"
    for name in set(sys.modules) - before:
        del sys.modules[name]


def refusal(name: object, what: str = "the reward") -> TokenCreditError:
    with pytest.raises(TokenCreditError) as caught:
        load_function(name, what)  # type: ignore[arg-type]
    assert "\n" not in caught.value.message
    return caught.value


def test_a_module_in_the_current_folder_is_found(folder: Path) -> None:
    (folder / "ours_in_cwd.py").write_text("class Length:\n    @staticmethod\n    def reward(**_):\n        return 1\n")
    assert load_function("ours_in_cwd:Length.reward", "the reward")() == 1


def test_a_module_beside_the_config_is_found_after_those_of_the_current_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "ours_beside.py").write_text("value = 'config'")
    (tmp_path / "ours_in_both.py").write_text("value = 'config'")
    (folder / "ours_in_both.py").write_text("value = 'current'")
    assert "No module named 'ours_beside'" in refusal("ours_beside:value").message
    add_search_folder(tmp_path)
    assert load_attribute("ours_beside:value", "the reward") == "config"
    assert load_attribute("ours_in_both:value", "the reward") == "current"


def test_an_installed_module_comes_first(folder: Path) -> None:
    (folder / "colorsys.py").write_text("def mine(): return 1")
    error = refusal("colorsys:mine")
    assert "'colorsys' (" in error.message and "has no 'mine'" in error.message
    assert "./colorsys.py:mine" in (error.hint or "")
    assert load_function("./colorsys.py:mine", "the reward")() == 1


def test_a_file_is_named_by_its_path(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "with-dash.py").write_text("import neighbour\ndef f(): return neighbour.number")
    (tmp_path / "neighbour.py").write_text("number = 5")
    for name in ("../with-dash.py:f", f"{tmp_path}/with-dash.py:f"):
        assert load_function(name, "the reward")() == 5
    assert load_function("../with-dash.py:f", "x") is load_function(f"{tmp_path}/with-dash.py:f", "x")
    add_search_folder(tmp_path)
    assert load_function("with-dash.py:f", "the reward")() == 5
    assert "no file './nothing.py'" in refusal("./nothing.py:f").message


@pytest.mark.parametrize(
    ("source", "kind", "line"),
    [
        ("import os\nimport no_such_package_of_ours\n", "ModuleNotFoundError: No module named 'no_such", 2),
        ("from os import nonsense\n", "ImportError: cannot import name 'nonsense'", 1),
        ("\n\nvalue = 1 / 0\n", "ZeroDivisionError: division by zero", 3),
        ("def f(:\n", "SyntaxError: ", 1),
        ("import sys\nsys.exit('usage: …')\n", "SystemExit: usage", 2),
        ("raise ValueError('two\\nlines')\n", "ValueError: two lines", 1),
    ],
)
@pytest.mark.parametrize("name", ["ours_broken:f", "./ours_broken.py:f"])
def test_an_error_inside_the_module_shows_its_own_message_and_line(
    folder: Path, name: str, source: str, kind: str, line: int
) -> None:
    (folder / "ours_broken.py").write_text(source)
    error = refusal(name)
    assert kind in error.message and f"ours_broken.py, line {line})" in error.message
    assert "the module was found" in (error.hint or "")


@pytest.mark.parametrize(
    "name", ["", ":", ":x", "a:", "no_colon", ".x:y", "..:y", "a b:c", "x\0y:z", "a-b:c", 3, None, b"a:b"]
)
def test_another_form_is_refused(name: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    assert "the reward is module:attribute, got" in refusal(name).message


def test_a_missing_part_of_a_package_is_named() -> None:
    assert "No module named 'os.nothing'" in refusal("os.nothing:f").message
    assert "No module named 'no_such_package_of_ours'" in refusal("no_such_package_of_ours.part:f").message


def test_what_cannot_be_called_is_refused() -> None:
    assert refusal("math:pi").message == "the reward must be a function, but 'math:pi' is a float"
    assert load_attribute("math:pi", "the constant") > 3

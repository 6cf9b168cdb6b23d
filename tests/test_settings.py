"""Records of settings: strict types, nearest names, sections, and a plain mapping back."""

import copy
import pickle
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field, model_validator

from tokencredit.errors import TokenCreditError
from tokencredit.files import dump_yaml, parse_yaml
from tokencredit.settings import Count, Names, Number, Seed, Settings, Text, Texts


class Inner(Settings):
    section: ClassVar[str] = "search"

    seed: Seed
    budget: Count = 15
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    rate: Annotated[Number, Field(ge=0)] = 1
    limit: Annotated[int, Field(ge=2, le=10_000)] = 2
    chat: bool | Literal["auto"] = "auto"
    ranker: Literal["log_ei", "ucb"] = "ucb"
    names: Names = ("top",)
    threads: Count | None = None
    options: Mapping[str, Any] = {}

    @model_validator(mode="after")
    def _check_budget(self) -> "Inner":
        if self.budget == 13:
            raise TokenCreditError("`search.budget` must not be 13", hint="choose 12")
        return self


class Filled(Settings):
    section: ClassVar[str] = "evaluation"

    every: Count = 20


class Outer(Settings):
    pool: Text
    search: Inner
    evaluation: Filled = Filled()
    other: Filled | None = None
    threshold: Number = 0.0
    paths: Texts = ()


def message(given: Any, kind: type[Settings] = Outer) -> str:
    with pytest.raises(TokenCreditError) as caught:
        kind.read(given)
    assert "\n" not in caught.value.message
    return str(caught.value)


def test_a_mapping_comes_back_as_it_was_with_defaults() -> None:
    settings = Outer.read({"pool": "p", "search": {"seed": 1, "names": "a", "options": {"x": [1]}}, "evaluation": None})
    mapping = settings.to_mapping()
    assert mapping == {
        "pool": "p",
        "search": {
            "seed": 1,
            "budget": 15,
            "share": 0.5,
            "rate": 1,
            "limit": 2,
            "chat": "auto",
            "ranker": "ucb",
            "names": ["a"],
            "threads": None,
            "options": {"x": [1]},
        },
        "evaluation": {"every": 20},
        "other": None,
        "threshold": 0.0,
        "paths": [],
    }
    assert Outer.read(parse_yaml(dump_yaml(mapping), "the settings")) == settings
    assert Outer.read(settings) is settings


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        ({"seed": True}, "`search.seed` must be a whole number, got True"),
        ({"seed": "3"}, "`search.seed` must be a whole number, got '3'"),
        ({"seed": 10**400}, "`search.seed` must be a whole number, got 1000"),
        ({"seed": 1, "budget": 0}, "`search.budget` must be a whole number of at least 1, got 0"),
        ({"seed": 1, "budget": 13}, "`search.budget` must not be 13\n\nhint: choose 12"),
        ({"seed": 1, "share": 2}, "`search.share` must be a number above 0 and of at most 1, got 2"),
        ({"seed": 1, "share": float("nan")}, "`search.share` must be a number above 0"),
        ({"seed": 1, "rate": -1}, "`search.rate` must be a number of at least 0, got -1"),
        ({"seed": 1, "limit": 1}, "must be a whole number of at least 2 and of at most 10,000, got 1"),
        ({"seed": 1, "chat": "no"}, "`search.chat` must be true or false or auto, got 'no'"),
        ({"seed": 1, "ranker": "ucbb"}, "unknown `search.ranker` 'ucbb', did you mean 'ucb'?"),
        ({"seed": 1, "ranker": 1}, "`search.ranker` must be log_ei or ucb, got 1"),
        ({"seed": 1, "names": ["a", 1]}, "`search.names` must be a name or a list of names, got ['a', 1]"),
        ({"seed": 1, "threads": "x"}, "`search.threads` must be a whole number of at least 1, or null, got 'x'"),
        ({"seed": 1, "options": 3}, "`search.options` must be a mapping, got 3"),
        ({"seed": 1, "budgt": 2}, "unknown key of `search` 'budgt', did you mean 'budget'?"),
        ({"seed": 1, 3: 2}, "unknown key of `search` '3'"),
        ({}, "`search` needs `seed`"),
        (5, "`search` must be a mapping, got 5"),
    ],
)
def test_what_is_wrong_is_one_line(search: Any, expected: str) -> None:
    assert expected in message({"pool": "p", "search": search})


def test_the_outermost_keys() -> None:
    assert "unknown config key 'modl'" in message({"modl": 1})
    assert "`threshold` must be a number, got True" in message({"pool": "p", "search": {"seed": 1}, "threshold": True})
    assert "`pool` must be a text, got ' '" in message({"pool": " ", "search": {"seed": 1}})
    assert "must be a mapping, got [1]" in message([1])


def test_a_number_keeps_its_spelling() -> None:
    whole = Outer.read({"pool": "p", "search": {"seed": 1}, "threshold": 1})
    assert repr(whole.to_mapping()["threshold"]) == "1"


def test_records_are_frozen_checked_when_changed_and_can_be_sent_to_a_process() -> None:
    settings = Outer(pool="p", search={"seed": 1})
    with pytest.raises(ValueError, match="frozen"):
        settings.pool = "q"  # type: ignore[misc]
    assert settings.replace(threshold=2).threshold == 2
    with pytest.raises(TokenCreditError, match="`threshold` must be a number"):
        settings.replace(threshold="2")
    assert pickle.loads(pickle.dumps(settings)) == settings == copy.deepcopy(settings)

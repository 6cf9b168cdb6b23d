"""The table of collectors: a row per field, functions that exist, options that are checked, a page that is current."""

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest

from tokencredit.adapters.trl.checks import ADAPTER_FIELDS, HOST_FIELDS
from tokencredit.batch.records import COLLECTORS, OPTIONAL_FIELDS, RUN_FIELDS
from tokencredit.collect.rollout import Rollout
from tokencredit.collect.table import TABLE, fields_of, resolve_options
from tokencredit.errors import TokenCreditError
from tokencredit.pipeline.plugins import load_attribute

DOCS = Path(__file__).parents[2] / "docs"


def test_every_field_has_a_row_and_a_sentence() -> None:
    assert TABLE.keys() == {*OPTIONAL_FIELDS, *RUN_FIELDS} == COLLECTORS.keys()


def test_functions_exist_and_take_their_options() -> None:
    options, _ = resolve_options({})
    for name, row in TABLE.items():
        if row.function is None:
            continue
        function = load_attribute(row.function, name)
        inspect.signature(function).bind(None, **options[name])
        assert function.__annotations__["rollout"] is Rollout


def test_what_hosts_have_is_read_from_the_table() -> None:
    assert fields_of(trl="tapped") == {"attention_entropies", "adapter_residuals"} == fields_of(verl="tapped")
    assert {"entropies", "ref_logprobs", "step"} <= HOST_FIELDS
    assert {"adapter_residuals", "doubling_ratios"} == ADAPTER_FIELDS


def test_fields_of_one_function_share_their_options() -> None:
    options, functions = resolve_options(
        {"attention_influences": {"share": 0.2}, "adapter_residuals": {"layer": "mean_all"}}
    )
    assert options["attention_distances"] == options["attention_influences"] == {"layers": None, "share": 0.2}
    assert options["doubling_ratios"] == {"rows": 16, "layer": "mean_all"}
    assert functions == {}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ([], "must be a mapping"),
        ({"entropie": {}}, "did you mean 'entropies'"),
        ({"entropies": {"layer": 1}}, "the collector of `entropies` has no options"),
        ({"attention_entropies": {"head": 1}}, "did you mean 'heads'"),
        ({"attention_entropies": {"heads": "all"}}, "`heads` of the collector of `attention_entropies`"),
        ({"attention_influences": {"share": 0.7}}, r"must be a number in \(0, 0.5\], got 0.7"),
        ({"doubling_ratios": {"rows": True}}, "must be a whole number of responses of at least 1, got True"),
        ({"importances": 3}, "must be a function, its name, or a mapping of options, got 3"),
    ],
)
def test_options_that_do_not_exist_are_refused(sections: Any, message: str) -> None:
    with pytest.raises(TokenCreditError, match=message):
        resolve_options(sections)


def test_the_table_in_the_docs_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(DOCS), *sys.path])
    import tables

    page = (DOCS / "configs.md").read_text()
    assert "<!-- collectors -->" in page
    assert tables.refreshed(page) == page, "run `python docs/tables.py`"

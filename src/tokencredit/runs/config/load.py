"""Load the config of a run from a YAML file or a mapping, with `--set` overrides."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokencredit.errors import TokenCreditError, shown
from tokencredit.files import parse_yaml, read_yaml
from tokencredit.pipeline.plugins import add_search_folder
from tokencredit.runs.config.run_config import RunConfig
from tokencredit.settings import plain_value

Source = RunConfig | Mapping[Any, Any] | str | Path


def load_config(source: Source, overrides: list[str] | None = None) -> RunConfig:
    """Load a config: defaults filled in, keys and types checked, credit and rewards parsed.

    Args:
      source: a path, a mapping, or a config that is loaded already. The folder of a file, and the current folder, are
        added to the end of `sys.path`, so that `module:function` finds modules beside the config.
      overrides: texts `section.key=value`; values are read as YAML.
    """
    if isinstance(source, RunConfig):
        if not overrides:
            return source
        source = source.to_mapping()
    if isinstance(source, Mapping):
        given = plain_value(source)
    else:
        given = _read_file(Path(source))
        _add_import_folders(Path(source))
    done: list[str] = []
    for item in overrides or []:
        _override(given, item, done)
    return RunConfig.read(given)


def _read_file(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise TokenCreditError(
            f"no config file {str(path)!r}", hint="for example `tokencredit train examples/quickstart.yaml`"
        )
    loaded = read_yaml(path, "config file")
    if not isinstance(loaded, dict):
        raise TokenCreditError(f"{path} must hold a mapping of config keys, got {type(loaded).__name__}")
    plain: dict[str, Any] = plain_value(loaded)
    return plain


def _add_import_folders(config: Path) -> None:
    """Last on the path, so that no file hides an installed module; worker processes inherit the path."""
    add_search_folder(config.absolute().parent)
    for folder in (str(Path.cwd()), str(config.absolute().parent)):
        if folder not in sys.path:
            sys.path.append(folder)


def _override(given: dict[str, Any], item: str, done: list[str]) -> None:
    """Set one `a.b=value`; `credit.alpha=0.3` sets a hyperparameter of a preset."""
    path, equals, text = item.partition("=")
    path = path.strip()
    if not equals or not path:
        raise TokenCreditError(
            f"--set takes key=value, got {shown(item)}", hint="for example --set trainer.learning_rate=1e-4"
        )
    value = plain_value(parse_yaml(text, f"--set {shown(item)}"), f"--set {path}")
    lost = next((earlier for earlier in done if earlier.startswith(f"{path}.")), None)
    if lost is not None:
        raise TokenCreditError(
            f"`--set {path}=…` replaces all of `{path}`, and with it the earlier `--set {lost}=…`",
            hint=f"give --set {path}=… first",
        )
    done.append(path)
    keys = path.split(".")
    if keys[0] == "credit" and len(keys) > 1:
        given["credit"] = _override_credit(
            given.get("credit", RunConfig.model_fields["credit"].default), ".".join(keys[1:]), value
        )
        return
    target = given
    for key in keys[:-1]:
        inner = target.get(key)
        target[key] = dict(inner) if isinstance(inner, Mapping) else {}
        target = target[key]
    target[keys[-1]] = value


def _override_credit(credit: Any, key: str, value: Any) -> Any:
    if isinstance(credit, str):
        return {credit: {key: value}}
    if isinstance(credit, Mapping) and len(credit) == 1 and "weighted_sum" not in credit:
        (name, hyperparameters), *_ = credit.items()
        if hyperparameters is None or isinstance(hyperparameters, Mapping):
            return {name: {**(hyperparameters or {}), key: value}}
    raise TokenCreditError(f"--set credit.{key} needs a preset name under `credit:`, got {shown(credit)}")

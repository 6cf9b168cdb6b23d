"""Models and tokenizers from local folders, and from the hub where a name says so."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tokencredit.errors import TokenCreditError

# The hub's models whose names have no owner.
NAMES_WITHOUT_OWNER = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2", "openai-gpt")


def load_model(path: str | Path, **options: Any) -> PreTrainedModel:
    """A causal language model, in float32 unless `dtype` is given; `options` are those of `from_pretrained`.

    From a local folder; a name such as `org/model` goes to the hub. `trust_remote_code` is off unless asked for.
    """
    return _load(AutoModelForCausalLM, path, "config.json", {"dtype": torch.float32} | options)


def load_tokenizer(path: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """A tokenizer from a local folder, padding on the left; a name such as `org/model` goes to the hub."""
    return _load(AutoTokenizer, path, "tokenizer_config.json", {"padding_side": "left"} | options)


def _load(kind: Any, path: str | Path, required: str, options: Mapping[str, Any]) -> Any:
    local = _looks_local(path)
    if local:
        _check_folder(Path(path).expanduser(), required)
    where = Path(path).expanduser() if local else path
    try:
        return kind.from_pretrained(where, local_files_only=local, **options)
    except Exception as error:  # transformers, safetensors and tokenizers each raise their own kinds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise TokenCreditError(
            f"cannot load {str(path)!r}: {reason[0]}",
            hint="build it again, or pass the folder that `save_pretrained` wrote",
        ) from error


def _looks_local(path: str | Path) -> bool:
    """Whether `path` means a folder here. Only `org/name`, and a few old names, may mean the hub."""
    text = str(path)
    return (
        isinstance(path, Path)
        or Path(text).expanduser().exists()
        or text.startswith((".", "/", "~"))
        or (text.count("/") != 1 and text not in NAMES_WITHOUT_OWNER)
    )


def _check_folder(folder: Path, required: str) -> None:
    if not folder.is_dir():
        raise TokenCreditError(
            f"no model folder at {str(folder)!r}: {'it is a file' if folder.exists() else 'nothing is there'}",
            hint="give the folder that `save_pretrained` wrote, or a name on the hub with its owner: `owner/name`",
        )
    if not (folder / required).is_file():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "(empty)"
        raise TokenCreditError(
            f"{str(folder)!r} is not a model folder: it has no {required}; found: {found}",
            hint="give the folder that `save_pretrained` wrote, or build the lab's model with `warm_start`",
        )

"""The model that reads a pool: loading, what its numbers depend on, and batches of encoded samples for it."""

import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokencredit.errors import TokenCreditError
from tokencredit.progress import printable
from tokencredit.recipes.pool.encode import Conversations, Encoded, Unread, encode_all


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scorer:
    """A loaded model with everything that its numbers depend on.

    With `skip_bad`, a sample that the chat template refuses has no signals (NaN) and no features, and is in `unread`.
    """

    model: Any
    tokenizer: Any
    name: str
    revision: str
    max_length: int = 1024
    batch_tokens: int = 8192
    skip_bad: bool = False
    unread: list[Unread] = field(default_factory=list)

    @property
    def facts(self) -> dict[str, object]:
        """What goes into the keys of its signals."""
        return {
            "model": self.name,
            "revision": self.revision,
            "tokenizer": len(self.tokenizer),
            "template": self.tokenizer.chat_template or "",
            "max_length": self.max_length,
            "dtype": str(next(self.model.parameters()).dtype),
        }

    @property
    def width(self) -> int:
        """The size of a hidden state."""
        return int(self.model.config.get_text_config().hidden_size)

    def encode(self, conversations: Conversations) -> list[Encoded]:
        """Encode conversations; a sample that is skipped has no ids."""
        return encode_all(self.tokenizer, conversations, self.max_length, self.unread if self.skip_bad else None)

    def pad(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Ids [batch, length] and the mask of real tokens, on the model's device."""
        pad = self.tokenizer.pad_token_id
        ids, real = pad_rows(rows, 0 if pad is None else pad)
        return ids.to(self.model.device), real.to(self.model.device)

    def batches(self, encoded: Sequence[Encoded]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Yield rows of similar length that have ids, those ids padded, and the mask of real tokens.

        The padded tokens of a batch fit into `batch_tokens`.
        """
        lengths = np.array([len(item.ids) for item in encoded])
        batch: list[int] = []
        for row in [row for row in np.argsort(lengths, kind="stable").tolist() if lengths[row]]:
            if batch and lengths[row] * (len(batch) + 1) > self.batch_tokens:
                yield batch, *self.pad([encoded[row].ids for row in batch])
                batch = []
            batch.append(row)
        if batch:
            yield batch, *self.pad([encoded[row].ids for row in batch])


def pad_rows(rows: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Pad ids on the right to [batch, length]; also the mask of real tokens, 0 and 1."""
    ids = torch.full((len(rows), max(map(len, rows))), pad)
    real = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        real[row, : len(tokens)] = 1
    return ids, real


def load_model(name: str, **options: Any) -> tuple[Any, Any]:
    """Load a model and its tokenizer, from a folder or the hub."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # "Loading weights" would fill a log with half-drawn bars
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        return AutoModelForCausalLM.from_pretrained(name, **options), tokenizer
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise TokenCreditError(f"cannot load model {name!r}: {printable(reason[0])}") from error


def load_scorer(name: str, max_length: int = 1024) -> Scorer:
    """Load a local or cached model; a local folder is identified by the hash of its weights."""
    model, tokenizer = load_model(name)
    revision = folder_revision(Path(name)) if Path(name).is_dir() else str(getattr(model.config, "_commit_hash", ""))
    return Scorer(model=model.eval(), tokenizer=tokenizer, name=name, revision=revision, max_length=max_length)


def folder_revision(folder: Path) -> str:
    """Hash the weights and settings in a model folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.json")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]

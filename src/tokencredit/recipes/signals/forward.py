"""One pass of a local model over the pool: losses, entropies, IFD, EL2N and pooled features, resumable by shards."""

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokencredit.errors import TokenCreditError
from tokencredit.files import make_folder, write_bytes
from tokencredit.progress import bar, printable
from tokencredit.recipes.pool.encode import Encoded, Unread, bos_of, encode_all
from tokencredit.recipes.pool.samples import Pool
from tokencredit.recipes.signals.logits import Read, hidden_states, reader_of

COLUMNS = ("loss", "ppl", "ifd", "entropy", "varentropy", "el2n", "len.response", "len.total", "truncated")
SHARD = 2048  # samples between two savings
TILE = 1024  # tokens whose logits exist at once


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


def load_scorer(name: str, max_length: int = 1024, device: str = "cpu") -> Scorer:
    """A local or cached model; a local folder is identified by the hash of its weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # "Loading weights" would fill a log with half-drawn bars
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name).to(device).eval()
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise TokenCreditError(f"cannot load model {name!r}: {printable(reason[0])}") from error
    revision = folder_revision(Path(name)) if Path(name).is_dir() else str(getattr(model.config, "_commit_hash", ""))
    return Scorer(model=model, tokenizer=tokenizer, name=name, revision=revision, max_length=max_length)


def folder_revision(folder: Path) -> str:
    """A hash of the weights and settings in a model folder."""
    import hashlib

    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.json")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


@torch.no_grad()
def score_pool(scorer: Scorer, pool: Pool, work: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """All columns of the pass and the features [N, width]; a killed pass goes on where it stopped.

    `work` holds finished shards and goes when the pass is done. Its name must contain the key of the pass.
    """
    make_folder(work)
    shards = range(0, len(pool), SHARD)
    with bar("model pass", len(pool)) as advance:
        for start in shards:
            positions = np.arange(start, min(start + SHARD, len(pool)), dtype=np.int32)
            path = work / f"{start:09d}.npz"
            if not path.is_file():
                before = len(scorer.unread)
                columns, features = score_samples(scorer, list(pool.samples(positions)))
                facts = {f"unread.{part}": _texts(scorer.unread[before:], part) for part in ("name", "reason")}
                save_shard(path, features=features, **columns, **facts)
            advance(len(positions))
    parts = [np.load(work / f"{start:09d}.npz", allow_pickle=False) for start in shards]
    scorer.unread[:] = [
        Unread(name=str(name), reason=str(reason))
        for part in parts
        for name, reason in zip(part["unread.name"], part["unread.reason"], strict=True)
    ]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}
    features = np.concatenate([part["features"] for part in parts])
    return columns, features


def _texts(unread: Sequence[Unread], part: str) -> np.ndarray:
    return np.array([getattr(item, part).encode("unicode_escape").decode() for item in unread], dtype=str)


def save_shard(path: Path, **arrays: np.ndarray) -> None:
    """Write the arrays of a shard, whole or absent."""
    from io import BytesIO

    buffer = BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_bytes(path, buffer.getvalue())


def finish(work: Path) -> None:
    """Drop the shards, once the columns are stored."""
    shutil.rmtree(work, ignore_errors=True)


@torch.no_grad()
def score_samples(
    scorer: Scorer, conversations: Sequence[Mapping[str, Any] | Sequence[Mapping[str, Any]]]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Columns and features of some samples of a pool, or of bare conversations."""
    unread = scorer.unread if scorer.skip_bad else None
    encoded = encode_all(scorer.tokenizer, conversations, scorer.max_length, unread)
    width = scorer.model.config.get_text_config().hidden_size
    there = [row for row, item in enumerate(encoded) if item.ids]
    read = reader_of(scorer.model, [encoded[row].ids for row in there])
    columns = {name: np.full(len(encoded), np.nan, np.float32) for name in COLUMNS}
    features = np.zeros((len(encoded), width), np.float32)
    columns["truncated"][there] = [encoded[row].truncated for row in there]
    columns["len.total"][there] = [len(encoded[row].ids) for row in there]
    columns["len.response"][there] = [int(encoded[row].mask.sum()) for row in there]
    for places in _batches([len(encoded[row].ids) for row in there], scorer.batch_tokens):
        rows = [there[place] for place in places]
        batch = [encoded[row] for row in rows]
        ids, real = _pad(scorer, [item.ids for item in batch])
        hidden = hidden_states(scorer.model, ids, real)
        features[rows] = pool_features(hidden, real.bool()).cpu().numpy()
        mask = torch.zeros_like(real, dtype=torch.bool)
        for row, item in enumerate(batch):
            mask[row, : len(item.ids)] = torch.from_numpy(item.mask)
        stats = token_statistics(read, hidden[:, :-1], ids[:, 1:], mask[:, 1:])
        for name in ("loss", "entropy", "varentropy", "el2n"):
            columns[name][rows] = _row_means(stats[name], mask[:, 1:]).cpu().numpy()
        columns["ifd"][rows] = _ifd(scorer, read, batch, _span_losses(stats["loss"], batch))
    columns["ppl"][:] = np.exp(np.minimum(columns["loss"], 80.0))
    return columns, features


def token_statistics(
    read: Read,
    hidden: Float[Tensor, "batch length width"],
    targets: Int[Tensor, "batch length"],
    mask: Bool[Tensor, "batch length"],
) -> dict[str, Float[Tensor, "batch length"]]:
    """Loss, entropy, varentropy (nats) and EL2N of the masked tokens, zero elsewhere.

        loss = −log p_a,  H = −Σ p log p,  V = Σ p (log p + H)²,  EL2N = ‖p − e_a‖₂ = √(Σ p² − 2 p_a + 1)

    In tiles of 1024 tokens and float32: the logits of a batch never exist at once.

    Args:
      read: logits of hidden states, such as `reader_of` gives.
      hidden: the states that predict the targets.
      targets: token ids.
      mask: the tokens that count.
    """
    result = {
        name: hidden.new_zeros(targets.shape, dtype=torch.float32) for name in ("loss", "entropy", "varentropy", "el2n")
    }
    where = mask.nonzero()
    for tile in where.split(TILE):
        logprobs = read(hidden[tile[:, 0], tile[:, 1]]).log_softmax(-1)
        probs = logprobs.exp()
        chosen = logprobs.gather(1, targets[tile[:, 0], tile[:, 1], None]).squeeze(1)
        entropy = torch.special.entr(probs).sum(1)
        at = (tile[:, 0], tile[:, 1])
        result["loss"][at] = -chosen
        result["entropy"][at] = entropy
        centred = torch.where(probs > 0, logprobs + entropy[:, None], 0.0)
        result["varentropy"][at] = (probs * centred**2).sum(1)
        result["el2n"][at] = ((probs**2).sum(1) - 2 * chosen.exp() + 1).clamp_min(0).sqrt()
    return result


def pool_features(
    hidden: Float[Tensor, "batch length width"], real: Bool[Tensor, "batch length"]
) -> Float[Tensor, "batch width"]:
    """h = Σ i hᵢ / Σ i over real tokens i = 1, 2, …, scaled to length 1 (RDS+, arXiv:2503.01807); padding weighs 0."""
    weights = torch.where(real, real.cumsum(1), 0).to(torch.float32)
    pooled = torch.einsum("bl,blw->bw", weights, torch.where(real[..., None], hidden.float(), 0.0))
    return torch.nn.functional.normalize(pooled / weights.sum(1, keepdim=True).clamp_min(1), dim=1)


def _row_means(values: Tensor, mask: Tensor) -> Tensor:
    counts = mask.sum(1)
    return torch.where(counts > 0, torch.where(mask, values, 0.0).sum(1) / counts.clamp_min(1), torch.nan)


def _span_losses(losses: Tensor, batch: Sequence[Encoded]) -> list[list[list[float]]]:
    """For each sample and response the losses of its tokens from the second on."""
    return [[losses[row, start : stop - 1].tolist() for start, stop in item.spans] for row, item in enumerate(batch)]


def _ifd(scorer: Scorer, read: Read, batch: Sequence[Encoded], given: list[list[list[float]]]) -> list[float]:
    """Mean over turns of mean loss(response | instruction) / mean loss(response); NaN from 1 on.

    Both means run over the response tokens from the second on: a first token has no loss without context. Where the
    tokenizer begins every text with BOS, so does the response that is read alone: models such as Gemma give
    meaningless losses without it. Cherry_LLM, in contrast, reads the whole response after "### Response:" and counts
    its first token.
    """
    bos = bos_of(scorer.tokenizer)
    spans = [
        (row, turn, item.ids[start:stop])
        for row, item in enumerate(batch)
        for turn, (start, stop) in enumerate(item.spans)
    ]
    spans = [span for span in spans if len(span[2]) > 1]
    ratios: list[list[float]] = [[] for _ in batch]
    if spans:
        ids, real = _pad(scorer, [[*bos, *tokens] for _, _, tokens in spans])
        hidden = hidden_states(scorer.model, ids, real)
        mask = real[:, 1:].bool()
        mask[:, : len(bos)] = False  # the response's first token
        alone = _row_means(token_statistics(read, hidden[:, :-1], ids[:, 1:], mask)["loss"], mask)
        for (row, turn, _), loss in zip(spans, alone.tolist(), strict=True):
            ratios[row].append(float(np.mean(given[row][turn])) / max(loss, 1e-6))
    means = [float(np.mean(turns)) if turns else np.nan for turns in ratios]
    return [mean if mean < 1 else np.nan for mean in means]


def _pad(scorer: Scorer, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Right padding, [batch, length], and the mask of real tokens."""
    pad = scorer.tokenizer.pad_token_id
    ids = torch.full((len(rows), max(map(len, rows))), pad if pad is not None else 0)
    real = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        real[row, : len(tokens)] = 1
    return ids.to(scorer.model.device), real.to(scorer.model.device)


def _batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Rows of similar length whose padded tokens fit into the budget."""
    batch: list[int] = []
    for row in np.argsort(lengths, kind="stable").tolist():
        if batch and lengths[row] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch

"""One pass of a local model over the pool: losses, entropies, IFD, EL2N and pooled features, resumable by shards."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokencredit.files import make_folder, whole_file
from tokencredit.progress import bar
from tokencredit.recipes.pool.encode import Conversations, Encoded, Unread, bos_of
from tokencredit.recipes.pool.samples import Pool
from tokencredit.recipes.signals.load import Scorer
from tokencredit.recipes.signals.logits import Read, hidden_states, reader_of

COLUMNS = ("loss", "ppl", "ifd", "entropy", "varentropy", "el2n", "len.response", "len.total", "truncated")
SHARD = 2048  # samples between two savings
TILE = 1024  # tokens whose logits exist at once


def run_shards(pool: Pool, work: Path, title: str, write: Callable[[list[dict[str, Any]], Any], None]) -> list[Path]:
    """Write one file for every 2,048 samples and return the paths; finished files of a killed pass are kept.

    Args:
      pool: the pool.
      work: folder of the files, which `finish` drops. Its name must contain the key of the pass.
      title: of the progress bar.
      write: puts the numbers of some samples into an open file.
    """
    make_folder(work)
    paths = []
    with bar(title, len(pool)) as advance:
        for start in range(0, len(pool), SHARD):
            positions = np.arange(start, min(start + SHARD, len(pool)), dtype=np.int32)
            paths.append(work / f"{start:09d}.npz")
            if not paths[-1].is_file():
                with whole_file(paths[-1]) as file:
                    write(list(pool.samples(positions)), file)
            advance(len(positions))
    return paths


def finish(work: Path) -> None:
    """Drop the shards, once the columns are stored."""
    shutil.rmtree(work, ignore_errors=True)


def score_pool(scorer: Scorer, pool: Pool, work: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return all columns of the pass and the features [N, width]; see `run_shards`."""

    def write(samples: list[dict[str, Any]], file: Any) -> None:
        before = len(scorer.unread)
        columns, features = score_samples(scorer, samples)
        facts = {f"unread.{part}": _texts(scorer.unread[before:], part) for part in ("name", "reason")}
        np.savez(file, allow_pickle=False, features=features, **columns, **facts)

    shards = [np.load(path, allow_pickle=False) for path in run_shards(pool, work, "model pass", write)]
    scorer.unread[:] = [
        Unread(name=str(name), reason=str(reason))
        for shard in shards
        for name, reason in zip(shard["unread.name"], shard["unread.reason"], strict=True)
    ]
    columns = {name: np.concatenate([shard[name] for shard in shards]) for name in COLUMNS}
    return columns, np.concatenate([shard["features"] for shard in shards])


def _texts(unread: Sequence[Unread], part: str) -> np.ndarray:
    return np.array([getattr(item, part).encode("unicode_escape").decode() for item in unread], dtype=str)


@torch.no_grad()
def score_samples(scorer: Scorer, conversations: Conversations) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return columns and features of some samples of a pool, or of bare conversations."""
    encoded = scorer.encode(conversations)
    there = [row for row, item in enumerate(encoded) if item.ids]
    read = reader_of(scorer.model, [encoded[row].ids for row in there])
    columns = {name: np.full(len(encoded), np.nan, np.float32) for name in COLUMNS}
    features = np.zeros((len(encoded), scorer.width), np.float32)
    columns["truncated"][there] = [encoded[row].truncated for row in there]
    columns["len.total"][there] = [len(encoded[row].ids) for row in there]
    columns["len.response"][there] = [int(encoded[row].mask.sum()) for row in there]
    for rows, ids, real in scorer.batches(encoded):
        batch = [encoded[row] for row in rows]
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
    names = ("loss", "entropy", "varentropy", "el2n")
    result = {name: hidden.new_zeros(targets.shape, dtype=torch.float32) for name in names}
    for tile in mask.nonzero().split(TILE):
        at = (tile[:, 0], tile[:, 1])
        logprobs = read(hidden[at]).log_softmax(-1)
        probs = logprobs.exp()
        chosen = logprobs.gather(1, targets[at][:, None]).squeeze(1)
        entropy = torch.special.entr(probs).sum(1)
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


def _ifd(scorer: Scorer, read: Read, batch: Sequence[Encoded], prompted: list[list[list[float]]]) -> list[float]:
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
        ids, real = scorer.pad([[*bos, *tokens] for _, _, tokens in spans])
        hidden = hidden_states(scorer.model, ids, real)
        mask = real[:, 1:].bool()
        mask[:, : len(bos)] = False  # the response's first token
        alone = _row_means(token_statistics(read, hidden[:, :-1], ids[:, 1:], mask)["loss"], mask)
        for (row, turn, _), loss in zip(spans, alone.tolist(), strict=True):
            ratios[row].append(float(np.mean(prompted[row][turn])) / max(loss, 1e-6))
    means = [float(np.mean(turns)) if turns else np.nan for turns in ratios]
    return [mean if mean < 1 else np.nan for mean in means]

"""Values over accepted responses whose spellings are too many to list: those with probability, and a bound on the rest.

    V(x) ≤ Σ_{c listed} π(c) + Σ_{o open} π(o) (1 − V(o))

An open prefix leaves the listed spellings by one token and can still spell an accepted text; V(o) is what listed
spellings through it have. The search completes the open prefixes that the policy is most likely to reach, until what is
left is at most a hundredth of V or the budget of tokens is spent.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokencredit.collect.exact.score import NodeScores, score_trie
from tokencredit.collect.exact.spellings import Lattice
from tokencredit.collect.exact.trie import NodeValues, TokenIds, Trie, build_trie, reach, value_nodes

CLOSE = 0.01  # share of V that may be left out
ROUNDS = 12
BUDGET = 4096  # tokens of the listed spellings of one prompt, beyond which no more are added
AT_ONCE = 32  # prefixes of one prompt that are completed in one round

Valued = tuple[Trie, NodeValues, Float[Tensor, " prompt"]]


def value_accepted(
    model: Any,
    prompts: Sequence[TokenIds],
    accepted: Sequence[Sequence[TokenIds]],
    *,
    temperature: float = 1.0,
    tile_tokens: int,
) -> Valued:
    """The trie of the accepted responses with the values of its nodes, and a bound on what each prompt lacks."""
    lattices: list[list[Lattice]] = [list(getattr(responses, "lattices", ())) for responses in accepted]
    listed = [[list(ids) for ids in responses] for responses in accepted]
    if not any(lattices):
        trie = build_trie(listed)
        scores = score_trie(model, prompts, trie, temperature=temperature, tile_tokens=tile_tokens)
        return trie, value_nodes(trie, *scores), torch.zeros(len(prompts), dtype=torch.float64)
    following: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for number in range(ROUNDS + 1):
        openings = [
            _open(rows, group, p, following) for p, (rows, group) in enumerate(zip(listed, lattices, strict=True))
        ]
        union = build_trie([[*rows, *more] for rows, more in zip(listed, openings, strict=True)])
        scores = score_trie(model, prompts, union, temperature=temperature, tile_tokens=tile_tokens)
        masses = _open_masses(union, scores, listed, openings)
        values = value_nodes(union, *scores, accepted=_accepted_rows(listed, openings)).values[: len(prompts)]
        omitted = torch.stack([mass.sum() for mass in masses])
        if number == ROUNDS or not _extend(listed, openings, masses, lattices, values):
            break
    trie = build_trie(listed)
    place = _places(trie, union, listed, openings)
    nodes = value_nodes(trie, scores.logprobs[place], scores.entropies[place])
    return trie, nodes, omitted


def _open(
    rows: list[list[int]],
    lattices: list[Lattice],
    prompt: int,
    following: dict[tuple[int, tuple[int, ...]], list[int]],
) -> list[list[int]]:
    """Prefixes one token off the listed spellings from which an accepted text can still be spelled."""
    if not lattices:
        return []
    prefixes = {tuple(ids[:stop]) for ids in rows for stop in range(len(ids) + 1)}
    found: dict[tuple[int, ...], None] = {}
    for prefix in sorted(prefixes, key=lambda item: (len(item), item)):
        if (prompt, prefix) not in following:
            tokens = {token for lattice in lattices for token in lattice.after(prefix)}
            following[prompt, prefix] = sorted(tokens)
        found |= {(*prefix, token): None for token in following[prompt, prefix] if (*prefix, token) not in prefixes}
    return [list(prefix) for prefix in found]


def _accepted_rows(listed: list[list[list[int]]], openings: list[list[list[int]]]) -> Tensor:
    """True for the rows of the union that are listed, in the order of `build_trie`."""
    return torch.tensor(
        [
            real
            for rows, more in zip(listed, openings, strict=True)
            for real in [True] * len(rows) + [False] * len(more)
        ],
        dtype=torch.bool,
    )


def _open_masses(
    union: Trie, scores: NodeScores, listed: list[list[list[int]]], openings: list[list[list[int]]]
) -> list[Float[Tensor, " opening"]]:
    """The probability that the policy reaches each open prefix; nothing listed goes through one."""
    passed = reach(union, scores.logprobs).exp()
    found, start = [], 0
    for rows, more in zip(listed, openings, strict=True):
        paths = union.paths[start + len(rows) : start + len(rows) + len(more)]
        last = (paths >= 0).sum(1) - 1
        found.append(passed[paths.gather(1, last[:, None])[:, 0]] if len(more) else passed.new_zeros(0))
        start += len(rows) + len(more)
    return found


def _extend(
    listed: list[list[list[int]]],
    openings: list[list[list[int]]],
    masses: list[Tensor],
    lattices: list[list[Lattice]],
    values: Tensor,
) -> bool:
    """Complete the likeliest open prefixes, in place; False where every prompt is close enough or at its budget."""
    grown = False
    for prompt, (rows, more, mass) in enumerate(zip(listed, openings, masses, strict=True)):
        if float(mass.sum()) <= CLOSE * float(values[prompt]) or sum(map(len, rows)) > BUDGET:
            continue
        known = {tuple(ids) for ids in rows}
        for index in mass.argsort(descending=True, stable=True)[:AT_ONCE].tolist():
            whole = [lattice.complete(_text_of(lattice, more[index])) for lattice in lattices[prompt]]
            if more[index][-1] == lattices[prompt][0].eos:  # the prefix is a spelling itself
                whole = [more[index]]
            for ids in whole:
                if ids is not None and tuple(ids) not in known:
                    known.add(tuple(ids))
                    rows.append(ids)
                    grown = True
    return grown


def _text_of(lattice: Lattice, prefix: list[int]) -> list[int]:
    return prefix[:-1] if prefix[-1] == lattice.eos else prefix


def _places(
    trie: Trie, union: Trie, listed: list[list[list[int]]], openings: list[list[list[int]]]
) -> Int[Tensor, " node"]:
    """The node of the union for each node of the trie of listed responses."""
    place = torch.arange(trie.prompts)
    place = torch.cat((place, torch.zeros(trie.parent.numel() - trie.prompts, dtype=torch.long)))
    own = union.paths[_accepted_rows(listed, openings)][:, : trie.paths.shape[1]]
    inside = trie.paths >= 0
    place[trie.paths[inside]] = own[inside]
    return place

"""Exact credit on tasks whose accepted responses can be listed: values, information and hindsight from one forward.

    V(s) = Σ_{c ∈ C(x), c starts with s} exp Σ_{k ≥ |s|} ln π(c_k | x, c_<k)      0 for a prefix of no accepted response

C(x) holds the accepted responses of prompt x, EOS included; reward 1 for its members, 0 for everything else. A text
that the tokenizer can spell in several ways is several members: `exact_spellings` lists them, or bounds those left out.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tokencredit.collect.exact.score import TILE_TOKENS
from tokencredit.collect.exact.search import CLOSE, value_accepted
from tokencredit.collect.exact.spellings import Accepted, encode_accepted
from tokencredit.collect.exact.trie import NodeValues, TokenIds, Trie, check_accepted
from tokencredit.errors import TokenCreditError
from tokencredit.methods.exact import hindsight_posterior


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PrefixCredit:
    """What exact credit knows of each token of sampled responses, about the prefix before it; 0 outside the mask.

    `values`: V, `information`: I(o; r | s) in nats, `nodes`: the prefix as a node of the trie, −1 where it has left it.
    """

    values: Float[Tensor, "batch response"]
    information: Float[Tensor, "batch response"]
    nodes: Int[Tensor, "batch response"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExactCredit:
    """The trie of the accepted responses of some prompts, and the values of its nodes under one model.

    `omitted` bounds from above what V(x) lacks: the probability of spellings of accepted texts that are not listed. It
    is 0 where all are, and the values are then exact; else V(x) lies between `prompt_values` and their sum.
    """

    trie: Trie
    nodes: NodeValues
    show: Callable[[TokenIds], str] = str
    omitted: Float[Tensor, " prompt"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    @property
    def prompt_values(self) -> Float[Tensor, " prompt"]:
        """V(x), the success probability of each prompt."""
        return self.nodes.values[: self.trie.prompts]

    def children(self, node: int) -> tuple[Int[Tensor, " child"], Float[Tensor, " child"], Float[Tensor, " child"]]:
        """Tokens that keep success possible at `node`, their probability, and Q after each; Q is 0 for all others."""
        below = self.trie.children[node]
        at = torch.tensor(list(below.values()), dtype=torch.long)
        return (
            torch.tensor(list(below), dtype=torch.long),
            self.nodes.token_logprobs[at].exp(),
            self.nodes.values[at],
        )

    def posterior(self, node: int, probs: Float[Tensor, " vocab"], *, success: bool) -> Float[Tensor, " vocab"]:
        """The hindsight posterior at `node`, from the policy's distribution `probs` over the whole vocabulary."""
        tokens, _, q = self.children(node)
        return hindsight_posterior(probs, torch.zeros_like(probs).index_put((tokens,), q.to(probs)), success=success)

    def of_responses(
        self,
        prompts: Int[Tensor, " batch"],
        response_ids: Int[Tensor, "batch response"],
        response_mask: Bool[Tensor, "batch response"],
    ) -> PrefixCredit:
        """Credit of sampled responses; `prompts` says which prompt of the trie each row answers."""
        nodes = torch.full(response_ids.shape, -1)
        for row, prompt in enumerate(prompts.tolist()):
            at = _positions_of(response_mask[row], row)
            walked = self.trie.walk(prompt, response_ids[row][at].tolist())
            nodes[row, at] = torch.tensor(walked[:-1], dtype=torch.long)
        known = nodes >= 0
        return PrefixCredit(
            values=torch.where(known, self.nodes.values[nodes.clamp_min(0)], 0.0),
            information=torch.where(known, self.nodes.information[nodes.clamp_min(0)], 0.0),
            nodes=nodes,
        )

    def check_rewards(
        self,
        prompts: Int[Tensor, " batch"],
        response_ids: Int[Tensor, "batch response"],
        response_mask: Bool[Tensor, "batch response"],
        rewards: Float[Tensor, " batch"],
    ) -> None:
        """Refuse rewards that are not exactly membership in the list, naming the response.

        A response whose text is listed in other tokens is accepted too: it counts, with V = 0 behind the tokens that it
        shares with a listed spelling.
        """
        texts = {}
        for row, prompt in enumerate(prompts.tolist()):
            ids = response_ids[row][response_mask[row]].tolist()
            listed, reward = self.trie.ends_at_leaf(prompt, ids), float(rewards[row])
            if reward == float(listed):
                continue
            if not listed and reward == 1.0 and ids:
                if prompt not in texts:
                    texts[prompt] = self._texts(prompt)
                if (self.show(ids[:-1]), ids[-1]) in texts[prompt]:
                    continue
            verdict = f"is {'listed' if listed else 'not listed'} as accepted and has reward {reward:g}"
            raise TokenCreditError(
                f"the verifier and the list disagree: response {self.show(ids)!r} to prompt {prompt} {verdict}",
                hint="rewards must be 1 for every listed response and 0 for all others; list every accepted response",
            )

    def _texts(self, prompt: int) -> set[tuple[str, int]]:
        """(text, last token) of the listed responses of a prompt."""
        listed = [row[1:][row[1:] >= 0] for row in self.trie.paths[self.trie.owners == prompt]]
        found = [self.trie.token[nodes].tolist() for nodes in listed]
        return {(self.show(ids[:-1]), ids[-1]) for ids in found if ids}


def exact_credit(
    model: nn.Module,
    prompts: Sequence[TokenIds],
    accepted: Sequence[Sequence[TokenIds]],
    *,
    eos_token_id: int,
    temperature: float = 1.0,
    tile_tokens: int = TILE_TOKENS,
    show: Callable[[TokenIds], str] = str,
) -> ExactCredit:
    """Values of every prefix of every accepted response, from teacher-forced passes over them in tiles.

    `accepted[p]` are the accepted responses to `prompts[p]` as token ids, EOS included; a prompt may have none. Lists
    from `encode_accepted` may know of further spellings: those that matter are added, and `omitted` bounds the rest,
    with a warning where that may be more than a hundredth of V(x).

    The pass runs in eval mode in the model's dtype, the sums over the trie in float64. The policy is softmax(logits /
    temperature). A response that is cut off counts as failed, so no listed response may be longer than the sampler's
    limit.
    """
    check_accepted(accepted, eos_token_id, show)
    trie, nodes, omitted = value_accepted(model, prompts, accepted, temperature=temperature, tile_tokens=tile_tokens)
    credit = ExactCredit(trie=trie, nodes=nodes, show=show, omitted=omitted)
    _warn_of_omitted(credit)
    return credit


class ExactValues:
    """Collector of `values`, for prompts whose accepted responses a function lists.

    `accepted(columns)` gives the texts that are accepted, without EOS, from the row of the data set; lists of token ids
    are taken as they are. A text counts in every spelling (`encode_accepted`), or a warning says how much is left out.

    `verify(columns, text)` is the verifier, asked about every finished response so that a wrong list is found where it
    happens. Lists are encoded once per prompt; the forward over them runs on every call, as the policy moves.
    `max_tokens` is the sampler's limit, EOS included: longer spellings of a text cannot be sampled.
    """

    provides = frozenset({"values"})

    def __init__(
        self,
        accepted: Callable[[Mapping[str, Any]], Sequence[str | TokenIds]],
        verify: Callable[[Mapping[str, Any], str], bool] | None = None,
        *,
        tile_tokens: int = TILE_TOKENS,
        max_tokens: int | None = None,
    ) -> None:
        self.max_tokens = max_tokens
        self.accepted = accepted
        self.verify = verify
        self.tile_tokens = tile_tokens
        self._encoded: dict[tuple[int, ...], Accepted] = {}

    @torch.no_grad()
    def __call__(self, rollout: Any) -> Float[Tensor, "batch response"]:
        """Values of the prefixes of a `Rollout`: model, tokenizer, prompt and response ids with masks, columns."""
        asked = [
            tuple(ids[mask].tolist()) for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask.bool(), strict=True)
        ]
        place = {prompt: index for index, prompt in enumerate(dict.fromkeys(asked))}
        for prompt, columns in zip(asked, rollout.columns, strict=True):
            if prompt not in self._encoded:
                texts = self.accepted(columns)
                self._encoded[prompt] = encode_accepted(rollout.tokenizer, texts, max_tokens=self.max_tokens)
        at = torch.tensor([place[prompt] for prompt in asked], dtype=torch.long)
        ids, mask = rollout.response_ids.cpu(), rollout.response_mask.cpu()
        credit = exact_credit(
            rollout.model,
            list(place),
            self._with_sampled(list(place), at, ids, mask),
            eos_token_id=rollout.tokenizer.eos_token_id,
            tile_tokens=self.tile_tokens,
            temperature=rollout.temperature,
            show=rollout.tokenizer.decode,
        )
        if self.verify is not None:
            credit.check_rewards(at, ids, mask, self._verdicts(rollout, ids, mask))
        return credit.of_responses(at, ids, mask).values.to(rollout.response_ids.device)

    def _with_sampled(self, prompts: list[tuple[int, ...]], at: Tensor, ids: Tensor, mask: Tensor) -> list[Accepted]:
        """The lists of the prompts, with sampled spellings of their texts that are not in them."""
        found: list[Accepted] = []
        for index, prompt in enumerate(prompts):
            known = self._encoded[prompt]
            if not known.lattices:
                found.append(known)
                continue
            listed = {tuple(item) for item in known}
            rows = {tuple(ids[row][mask[row]].tolist()) for row in (at == index).nonzero()[:, 0].tolist()} - listed
            new = [
                list(row)
                for row in sorted(rows)
                if any(
                    row[-1:] == (lattice.eos,) and lattice.eos in lattice.after(row[:-1]) for lattice in known.lattices
                )
            ]
            found.append(Accepted([*known, *new], known.lattices))
        return found

    def _verdicts(self, rollout: Any, ids: Tensor, mask: Tensor) -> Float[Tensor, " batch"]:
        assert self.verify is not None
        verdicts = []
        for row, columns in enumerate(rollout.columns):
            *text, last = ids[row][mask[row]].tolist() or [-1]
            finished = last == rollout.tokenizer.eos_token_id
            verdicts.append(finished and self.verify(columns, rollout.tokenizer.decode(text)))
        return torch.tensor(verdicts, dtype=torch.float64)


def _warn_of_omitted(credit: ExactCredit) -> None:
    """Say how far below the truth values may lie where spellings are left out."""
    values = credit.prompt_values
    short = credit.omitted > CLOSE * values
    if bool(short.any()):
        prompt = int(torch.where(short, credit.omitted, -1.0).argmax())
        warnings.warn(
            f"exact values are lower bounds for {int(short.sum())} of {len(values)} prompts: the listed spellings of "
            f"the accepted texts have probability {float(values[prompt]):.3g} at prompt {prompt}, those left out at "
            f"most {float(credit.omitted[prompt]):.3g}",
            stacklevel=3,
        )


def _positions_of(mask: Bool[Tensor, " response"], row: int) -> Int[Tensor, " token"]:
    """Columns of the chosen tokens; text inserted between them would change the state, and no list knows of it."""
    at = mask.nonzero().squeeze(1)
    if at.numel() and int(at[-1] - at[0]) + 1 != at.numel():
        raise TokenCreditError(
            f"exact credit needs responses without inserted text, got holes in the mask of row {row}",
            hint="use `collect.monte_carlo` for environments",
        )
    return at

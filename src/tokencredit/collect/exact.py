"""Exact credit on tasks whose accepted responses can be listed: values, information and hindsight from one forward.

    V(s) = Σ_{c ∈ C(x), c starts with s} exp Σ_{k ≥ |s|} ln π(c_k | x, c_<k)      0 for a prefix of no accepted response

C(x) holds the accepted responses of prompt x, EOS included; reward 1 for its members, 0 for everything else.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tokencredit.collect.exact_score import TILE_TOKENS, evaluating, score_trie
from tokencredit.collect.exact_trie import NodeValues, TokenIds, Trie, build_trie, check_accepted, value_nodes
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
    """The trie of the accepted responses of some prompts, and the values of its nodes under one model."""

    trie: Trie
    nodes: NodeValues
    show: Callable[[TokenIds], str] = str

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
        """Refuse rewards that are not exactly membership in the list, naming the response."""
        for row, prompt in enumerate(prompts.tolist()):
            ids = response_ids[row][response_mask[row]].tolist()
            listed, reward = self.trie.ends_at_leaf(prompt, ids), float(rewards[row])
            if reward == float(listed):
                continue
            verdict = f"is {'listed' if listed else 'not listed'} as accepted and has reward {reward:g}"
            raise TokenCreditError(
                f"the verifier and the list disagree: response {self.show(ids)!r} to prompt {prompt} {verdict}",
                hint="rewards must be 1 for every listed response and 0 for all others; list every accepted response, "
                "in the tokens that the model emits",
            )


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
    """Values of every prefix of every accepted response, from one teacher-forced pass over them in tiles.

    `accepted[p]` are the accepted responses to `prompts[p]` as token ids, EOS included; a prompt may have none. The
    pass runs in the model's dtype, the sums over the trie in float64. The policy is softmax(logits / temperature). A
    response that is cut off counts as failed, so no listed response may be longer than the sampler's limit.
    """
    check_accepted(accepted, eos_token_id, show)
    trie = build_trie(accepted)
    logprobs, entropies = score_trie(model, prompts, trie, temperature=temperature, tile_tokens=tile_tokens)
    return ExactCredit(trie=trie, nodes=value_nodes(trie, logprobs, entropies), show=show)


def encode_accepted(tokenizer: Any, responses: Sequence[str]) -> list[list[int]]:
    """Texts as token ids, EOS appended.

    One spelling a text: a policy that reaches the same text by other tokens is not counted, and `check_rewards` refuses
    it when it happens. Tokenizers with one way to write a text, such as characters, have no such case.
    """
    if not responses:
        return []
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(responses), add_special_tokens=False)["input_ids"]]


class ExactValues:
    """Collector of `values`, for prompts whose accepted responses a function lists.

    `accepted(columns)` gives the texts that are accepted, without EOS, from the row of the data set. `verify(columns,
    text)` is the verifier, asked about every finished response so that a wrong list is found where it happens. Lists
    are encoded once a prompt; the forward over them runs on every call, as the policy moves.
    """

    provides = frozenset({"values"})

    def __init__(
        self,
        accepted: Callable[[Mapping[str, Any]], Sequence[str]],
        verify: Callable[[Mapping[str, Any], str], bool] | None = None,
        *,
        tile_tokens: int = TILE_TOKENS,
    ) -> None:
        self.accepted = accepted
        self.verify = verify
        self.tile_tokens = tile_tokens
        self._encoded: dict[tuple[int, ...], list[list[int]]] = {}

    @torch.no_grad()
    def __call__(self, rollout: Any) -> Float[Tensor, "batch response"]:
        """Values of the prefixes of a `Rollout`: model, tokenizer, prompt and response ids with masks, columns."""
        asked = [
            tuple(ids[mask].tolist()) for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask.bool(), strict=True)
        ]
        place = {prompt: index for index, prompt in enumerate(dict.fromkeys(asked))}
        for prompt, columns in zip(asked, rollout.columns, strict=True):
            if prompt not in self._encoded:
                self._encoded[prompt] = encode_accepted(rollout.tokenizer, self.accepted(columns))
        with evaluating(rollout.model):
            credit = exact_credit(
                rollout.model,
                list(place),
                [self._encoded[prompt] for prompt in place],
                eos_token_id=rollout.tokenizer.eos_token_id,
                tile_tokens=self.tile_tokens,
                temperature=rollout.temperature,
                show=rollout.tokenizer.decode,
            )
        at = torch.tensor([place[prompt] for prompt in asked])
        ids, mask = rollout.response_ids.cpu(), rollout.response_mask.cpu()
        if self.verify is not None:
            credit.check_rewards(at, ids, mask, self._verdicts(rollout, ids, mask))
        return credit.of_responses(at, ids, mask).values.to(rollout.response_ids.device)

    def _verdicts(self, rollout: Any, ids: Tensor, mask: Tensor) -> Float[Tensor, " batch"]:
        assert self.verify is not None
        verdicts = []
        for row, columns in enumerate(rollout.columns):
            *text, last = ids[row][mask[row]].tolist() or [-1]
            finished = last == rollout.tokenizer.eos_token_id
            verdicts.append(finished and self.verify(columns, rollout.tokenizer.decode(text)))
        return torch.tensor(verdicts, dtype=torch.float64)


def _positions_of(mask: Bool[Tensor, " response"], row: int) -> Int[Tensor, " token"]:
    """Columns of the chosen tokens; text inserted between them would change the state, and no list knows of it."""
    at = mask.nonzero().squeeze(1)
    if at.numel() and int(at[-1] - at[0]) + 1 != at.numel():
        raise TokenCreditError(
            f"exact credit needs responses without inserted text, got holes in the mask of row {row}",
            hint="use `collect.monte_carlo` for environments",
        )
    return at

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from exact_setup import (
    ACCEPTED,
    EOS,
    PROMPTS,
    VOCABULARY,
    next_probs,
    sampled,
    tiny_credit,
    tiny_model,
    value_by_hand,
)

from tokencredit import TokenBatch, TokenCreditError
from tokencredit.collect.exact import score as exact_score
from tokencredit.collect.exact.trie import build_trie
from tokencredit.collect.exact.values import ExactValues, exact_credit
from tokencredit.methods.exact import (
    binary_entropy,
    exact_advantage,
    hindsight_posterior,
    outcome_information,
)

LN2 = math.log(2)


def batch_of(texts: list[list[list[int]]]) -> tuple[TokenBatch, torch.Tensor]:
    """Sampled responses as a batch with 0/1 rewards, and the prompt of each row."""
    rows = [(prompt, text) for prompt, group in enumerate(texts) for text in group]
    width = max(len(text) for _, text in rows)
    prompts = torch.tensor([prompt for prompt, _ in rows])
    batch = TokenBatch(
        response_ids=torch.tensor([text + [0] * (width - len(text)) for _, text in rows]),
        response_mask=torch.tensor([[True] * len(text) + [False] * (width - len(text)) for _, text in rows]),
        rewards=torch.tensor([float(text in ACCEPTED[prompt]) for prompt, text in rows], dtype=torch.float64),
        group_ids=prompts,
    )
    return batch, prompts


# -- the estimator -------------------------------------------------------------------------------------------------


def test_advantage_is_the_change_of_the_value() -> None:
    batch = TokenBatch(
        response_ids=torch.zeros(3, 4, dtype=torch.long),
        response_mask=torch.tensor([[True, True, True, True], [True, True, False, False], [True, False, True, False]]),
        rewards=torch.tensor([1.0, 0.0, 1.0]),
        group_ids=torch.tensor([0, 0, 0]),
        values=torch.tensor([[0.25, 0.5, 0.5, 0.75], [0.25, 0.125, 9.0, 9.0], [0.25, torch.nan, 0.5, 9.0]]),
    )
    # row 0: .5−.25, 0, .75−.5, 1−.75 · row 1: .125−.25, 0−.125 · row 2, a hole: .5−.25, then 1−.5 at the last chosen
    expected = [[0.25, 0.0, 0.25, 0.25], [-0.125, -0.125, 0.0, 0.0], [0.25, 0.0, 0.5, 0.0]]
    torch.testing.assert_close(exact_advantage(batch), torch.tensor(expected, dtype=torch.float64))


# -- the theory, with the numbers of the specification ---------------------------------------------------------------


def test_state_with_three_tokens() -> None:
    probs, q = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64), torch.tensor([0.4, 0.2, 0.0], dtype=torch.float64)
    # V = .2 + .05 = .25; π_hs(·|1) = (.2, .05, 0)/.25; π_hs(·|0) = (.3, .2, .25)/.75
    success, failure = hindsight_posterior(probs, q, success=True), hindsight_posterior(probs, q, success=False)
    torch.testing.assert_close(success, torch.tensor([0.8, 0.2, 0.0], dtype=torch.float64))
    torch.testing.assert_close(failure, torch.tensor([0.4, 4 / 15, 1 / 3], dtype=torch.float64))
    # I = h_b(.25) − ½ h_b(.4) − ¼ h_b(.2) = .562335 − .336506 − .125101, and .25 · .331374 + .75 · .023847
    information = outcome_information(probs, q)
    assert float(information) == pytest.approx(0.100729, abs=1e-6)
    kl = [float((p * (p / probs).log()).nansum()) for p in (success, failure)]
    assert kl == pytest.approx([0.331374, 0.023847], abs=1e-6)
    assert float(information) == pytest.approx(0.25 * kl[0] + 0.75 * kl[1], abs=1e-12)
    # T8 and T9: E|A| = .15 ≤ √.0275 ≤ √(I/2); 2 · .0275 ≤ I ≤ .0275/.1875
    a = q - 0.25
    assert float((probs * a.abs()).sum()) == pytest.approx(0.15)
    assert 2 * 0.0275 <= float(information) <= 0.0275 / 0.1875


@pytest.mark.parametrize(
    ("probs", "q", "expected"),
    [
        ([0.5, 0.5], [1.0, 0.0], LN2),  # the outcome is the token
        ([0.125] * 8, [1.0] * 4 + [0.0] * 4, LN2),  # H = 3 ln 2, loose by a factor of three
        ([0.97, 0.02, 0.01], [0.5, 0.5, 0.5], 0.0),  # entropy without any information
        ([0.5], [0.8], 0.673012 - 0.5 * 0.500402),  # a mass of ½ outside the list: root of the tree of §6.1
        ([1.0], [1.0], 0.0),
    ],
)
def test_information_at_the_extremes(probs: list[float], q: list[float], expected: float) -> None:
    found = outcome_information(torch.tensor(probs, dtype=torch.float64), torch.tensor(q, dtype=torch.float64))
    assert float(found) == pytest.approx(expected, abs=2e-6)


def test_posterior_of_an_impossible_outcome_is_the_policy() -> None:
    probs = torch.tensor([0.25, 0.75])
    torch.testing.assert_close(hindsight_posterior(probs, torch.zeros(2), success=True), probs)


# -- values of prefixes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
def test_values_equal_the_definition(kind: str) -> None:
    credit = tiny_credit(kind)
    for prompt, responses in enumerate(ACCEPTED):
        for prefix in {tuple(c[:k]) for c in responses for k in range(len(c) + 1)} | {()}:
            node = credit.trie.walk(prompt, prefix)[-1]
            assert float(credit.nodes.values[node]) == pytest.approx(
                value_by_hand(tiny_model(kind), prompt, list(prefix)), abs=1e-12
            )


def test_all_ways_to_score_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = tiny_credit()
    assert exact_score.can_pack(tiny_model())
    small_tiles = exact_credit(tiny_model(), PROMPTS, ACCEPTED, eos_token_id=EOS, tile_tokens=1)
    monkeypatch.setattr(exact_score, "can_pack", lambda *args: False)
    plain = exact_credit(tiny_model(), PROMPTS, ACCEPTED, eos_token_id=EOS)
    for name in ("log_values", "token_logprobs", "entropies", "information"):
        for other in (small_tiles, plain):
            torch.testing.assert_close(getattr(other.nodes, name), getattr(packed.nodes, name), rtol=1e-10, atol=1e-12)


def test_float32_is_close_to_float64() -> None:
    single, double = tiny_credit(dtype=torch.float32), tiny_credit()
    torch.testing.assert_close(single.nodes.values, double.nodes.values, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(single.nodes.information, double.nodes.information, rtol=1e-3, atol=1e-6)


def test_a_model_that_cannot_see_a_tree_is_found_out() -> None:
    class Blind(torch.nn.Module):
        """Ignores masks and positions, as a recurrent model would."""

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.cell = torch.nn.Embedding(6, 8), torch.nn.GRU(8, 8, batch_first=True)
            self.head = torch.nn.Linear(8, 6)

        def get_output_embeddings(self) -> torch.nn.Linear:
            return self.head

        def forward(self, input_ids: torch.Tensor, **ignored: object) -> SimpleNamespace:
            return SimpleNamespace(logits=self.head(self.cell(self.embed(input_ids))[0]))

    torch.manual_seed(0)
    model = Blind().double()
    assert not exact_score.can_pack(model)
    credit = exact_credit(model, PROMPTS, ACCEPTED, eos_token_id=EOS)
    assert float(credit.prompt_values[0]) == pytest.approx(value_by_hand(model, 0, []), abs=1e-12)
    assert float(credit.prompt_values[2]) == 0.0


def test_telescoping_to_machine_precision() -> None:
    batch, prompts = batch_of(sampled(4, 12, seed=1))
    credit = tiny_credit().of_responses(prompts, batch.response_ids, batch.response_mask)
    advantages = exact_advantage(replace(batch, values=credit.values))
    total = batch.rewards - tiny_credit().prompt_values[prompts]
    torch.testing.assert_close(advantages.sum(1), total, rtol=0, atol=1e-10)
    assert bool((batch.rewards > 0).any())
    assert bool((batch.rewards == 0).any())


def test_every_bound_holds_at_every_state() -> None:
    credit = tiny_credit()
    values = credit.nodes.values
    for node in range(len(values)):
        if not credit.trie.children[node]:
            continue
        prompt, ids = 0, []
        while node >= credit.trie.prompts:
            ids.insert(0, int(credit.trie.token[node]))
            node = int(credit.trie.parent[node])
        prompt = node
        node = credit.trie.walk(prompt, ids)[-1]
        probs = next_probs(tiny_model(), PROMPTS[prompt] + ids)
        tokens, child_probs, child_values = credit.children(node)
        q = torch.zeros_like(probs).index_put((tokens,), child_values)
        value, entropy = values[node], credit.nodes.entropies[node]
        information = credit.nodes.information[node]
        torch.testing.assert_close(child_probs, probs[tokens])
        torch.testing.assert_close((probs * q).sum(), value)
        torch.testing.assert_close(entropy, torch.special.entr(probs).sum())
        # T2 in three forms
        difference = binary_entropy(value) - (probs * binary_entropy(q)).sum()
        success, failure = credit.posterior(node, probs, success=True), credit.posterior(node, probs, success=False)
        shift = (
            value * torch.xlogy(success, success / probs).sum()
            + (1 - value) * torch.xlogy(failure, failure / probs).sum()
        )
        torch.testing.assert_close(information, difference, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(information, shift, rtol=1e-9, atol=1e-12)
        # T3, T4, T5, T8, T9
        a = q - value
        assert information <= min(entropy, binary_entropy(value)) + 1e-12
        torch.testing.assert_close(success - probs, probs * a / value)
        torch.testing.assert_close(failure - probs, -probs * a / (1 - value))
        absolute, square = (probs * a.abs()).sum(), (probs * a.square()).sum()
        assert absolute <= square.sqrt() + 1e-12
        assert square <= information / 2 + 1e-12
        assert information <= square / (value * (1 - value)) + 1e-12


def test_information_and_squares_add_up_over_a_response() -> None:
    """T10: Σ_t E[I_t] = h_b(V(x)) and Σ_t E[A_t²] = V(x)(1−V(x)), by summing over the states of the trie."""
    from tokencredit.collect.exact.trie import reach

    credit = tiny_credit()
    trie, nodes = credit.trie, credit.nodes
    passing = reach(trie, nodes.token_logprobs).exp()
    for prompt in range(trie.prompts):
        states = [prompt, *trie.spans[prompt]]
        value = float(nodes.values[prompt])
        spent = sum(float(passing[node] * nodes.information[node]) for node in states)
        assert spent == pytest.approx(float(binary_entropy(nodes.values[prompt])), abs=1e-12)
        squares = 0.0
        for node in states:
            if trie.children[node]:
                _, probs, q = credit.children(node)
                inside = float((probs * (q - nodes.values[node]).square()).sum())
                outside = float((1 - probs.sum()) * nodes.values[node].square())
                squares += float(passing[node]) * (inside + outside)
        assert squares == pytest.approx(value * (1 - value), abs=1e-12)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accepted", "message"),
    [
        ([[2, EOS], [2, EOS]], "listed twice"),
        ([[2, 3]], "ends in EOS"),
        ([[2, EOS, EOS]], "nowhere else"),
        ([[]], "ends in EOS"),
    ],
)
def test_a_list_without_a_probability_is_refused(accepted: list[list[int]], message: str) -> None:
    with pytest.raises(TokenCreditError, match=message):
        exact_credit(tiny_model(), [[2]], [accepted], eos_token_id=EOS)


def test_an_unlisted_response_that_the_verifier_accepts_is_named() -> None:
    credit = replace(tiny_credit(), show=lambda ids: "".join("_$abcd"[i] for i in ids))
    ids, mask = torch.tensor([[2, 3, EOS], [3, 3, EOS]]), torch.ones(2, 3, dtype=torch.bool)
    credit.check_rewards(torch.tensor([0, 0]), ids, mask, torch.tensor([1.0, 0.0]))
    with pytest.raises(TokenCreditError, match=r"'bb\$' to prompt 0 is not listed as accepted and has reward 1"):
        credit.check_rewards(torch.tensor([0, 0]), ids, mask, torch.tensor([1.0, 1.0]))
    with pytest.raises(TokenCreditError, match=r"'ab\$' to prompt 0 is listed as accepted and has reward 0"):
        credit.check_rewards(torch.tensor([0, 0]), ids, mask, torch.tensor([0.0, 0.0]))


def test_inserted_text_is_refused() -> None:
    ids, mask = torch.tensor([[2, 3, EOS]]), torch.tensor([[True, False, True]])
    with pytest.raises(TokenCreditError, match="holes in the mask of row 0"):
        tiny_credit().of_responses(torch.tensor([0]), ids, mask)


def test_walk_leaves_the_trie_for_good() -> None:
    trie = build_trie([[[2, 3, EOS], [2, 4, EOS]]])
    assert trie.walk(0, [2, 5, EOS])[2:] == [-1, -1]
    assert not trie.ends_at_leaf(0, [2])
    assert trie.ends_at_leaf(0, [2, 4, EOS])


# -- the collector for trainers ----------------------------------------------------------------------------------------


class Letters:
    """A character tokenizer in five lines."""

    eos_token_id = EOS

    def __call__(self, texts: list[str], **ignored: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [["_$abcd".index(letter) for letter in text] for text in texts]}

    def decode(self, ids: list[int]) -> str:
        return "".join("_$abcd"[i] for i in ids)


def rollout_of(texts: list[list[int]], temperature: float = 1.0) -> SimpleNamespace:
    width = max(map(len, texts))
    return SimpleNamespace(
        model=tiny_model(),
        tokenizer=Letters(),
        prompt_ids=torch.tensor([[2, 3]] * len(texts)),
        prompt_mask=torch.ones(len(texts), 2, dtype=torch.bool),
        response_ids=torch.tensor([text + [0] * (width - len(text)) for text in texts]),
        response_mask=torch.tensor([[True] * len(text) + [False] * (width - len(text)) for text in texts]),
        columns=[{"answers": ["ab", "ac", "acc", "d", ""]}] * len(texts),
        temperature=temperature,
    )


def test_collector_fills_values_and_asks_the_verifier() -> None:
    collector = ExactValues(lambda row: row["answers"], lambda row, text: text in row["answers"])
    values = collector(rollout_of([[2, 4, EOS], [3, 3]]))
    expected = [
        [value_by_hand(tiny_model(), 0, [2, 4][:k]) for k in range(3)],
        [value_by_hand(tiny_model(), 0, []), 0, 0],
    ]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    too_kind = ExactValues(lambda row: row["answers"], lambda row, text: True)
    with pytest.raises(TokenCreditError, match=r"disagree: response 'bb\$'"):
        too_kind(rollout_of([[3, 3, EOS]]))


def test_temperature_is_that_of_the_sampler() -> None:
    collector = ExactValues(lambda row: [""])
    value = float(collector(rollout_of([[2, EOS]], temperature=2.0))[0, 0])
    with torch.no_grad():
        logits = tiny_model()(input_ids=torch.tensor([[2, 3]])).logits[0, -1]
    assert value == pytest.approx(float((logits / 2).softmax(-1)[EOS]), abs=1e-12)
    assert logits.numel() == VOCABULARY

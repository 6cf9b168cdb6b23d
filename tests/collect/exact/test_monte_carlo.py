"""Values by continuation against exact values."""

import copy

import pytest
import torch
from exact_setup import ACCEPTED, EOS, PROMPTS, next_probs, sampled, tiny_credit, tiny_model

from tokencredit import TokenCreditError
from tokencredit.collect.exact.monte_carlo import MonteCarloValues, Sampler, generating, monte_carlo_values
from tokencredit.seeds import generator

LIMIT = 4  # the longest accepted response


def table_sampler(seed: int) -> Sampler:
    """Continuations from the model's own next-token probabilities, one state at a time, remembered."""
    rng, seen = generator("monte carlo test", seed), {}

    def sample(contexts: list, limits: list, each: int) -> list:
        found = []
        for context, limit in zip(contexts, limits, strict=True):
            texts = [[] for _ in range(each)]
            for text in texts:
                while len(text) < limit and EOS not in text:
                    state = (*context, *text)
                    if state not in seen:
                        seen[state] = next_probs(tiny_model(), list(state)).cumsum(0)
                    draw = torch.rand((), generator=rng, dtype=torch.float64)
                    text.append(min(int(torch.searchsorted(seen[state], draw, right=True)), 5))
            found.append(texts)
        return found

    return sample


def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    texts = [text[:LIMIT] for group in sampled(4, 60, seed=9) for text in group]
    texts += [c for responses in ACCEPTED for c in responses]
    owners = [prompt for prompt in range(4) for _ in range(60)]
    owners += [prompt for prompt, responses in enumerate(ACCEPTED) for _ in responses]
    ids = torch.tensor([text + [0] * (LIMIT - len(text)) for text in texts])
    mask = torch.tensor([[True] * len(text) + [False] * (LIMIT - len(text)) for text in texts])
    return torch.tensor(owners), ids, mask


def outcome(prompt: int, ids: list[int]) -> float:
    return float(list(ids) in ACCEPTED[prompt])


def distinct(owners: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, found: MonteCarloValues) -> dict:
    """(value, error) and exact value of every distinct prefix."""
    exact = tiny_credit().of_responses(owners, ids, mask).values
    table = {}
    for row, column in mask.nonzero().tolist():
        key = (int(owners[row]), *ids[row, :column].tolist())
        entry = (float(found.values[row, column]), float(found.errors[row, column]), float(exact[row, column]))
        assert table.setdefault(key, entry) == entry  # a shared prefix has one value
    return table


def test_values_lie_within_four_standard_errors_on_two_hundred_prefixes() -> None:
    owners, ids, mask = rows()
    found = monte_carlo_values(table_sampler(1), outcome, PROMPTS, owners, ids, mask, samples=128, max_response=LIMIT)
    table = distinct(owners, ids, mask, found)
    assert len(table) == found.prefixes >= 200
    errors = [(value - exact) / error for value, error, exact in table.values()]
    assert max(map(abs, errors)) < 4.0
    # and they are errors of about the stated size where success is neither sure nor impossible
    open_states = [z for z, (_, _, exact) in zip(errors, table.values(), strict=True) if 0.05 < exact < 0.95]
    assert len(open_states) > 10
    assert 0.6 < (sum(z * z for z in open_states) / len(open_states)) ** 0.5 < 1.4


def test_generate_is_such_a_sampler() -> None:
    owners, ids, mask = torch.tensor([0, 3]), torch.tensor([[2, 4, EOS], [2, 2, EOS]]), torch.ones(2, 3).bool()
    sample = generating(tiny_model(), eos_token_id=EOS, seed=3)
    found = monte_carlo_values(sample, outcome, PROMPTS, owners, ids, mask, samples=400, max_response=LIMIT)
    exact = tiny_credit().of_responses(owners, ids, mask).values
    assert bool(((found.values - exact).abs() < 4 * found.errors).all())
    again = monte_carlo_values(sample, outcome, PROMPTS, owners, ids, mask, samples=400, max_response=LIMIT)
    assert torch.equal(found.values, again.values)


def test_no_samples_are_refused() -> None:
    owners, ids, mask = torch.tensor([0]), torch.tensor([[EOS]]), torch.ones(1, 1).bool()
    with pytest.raises(TokenCreditError, match="`samples` must be at least 1, got 0"):
        monte_carlo_values(table_sampler(0), outcome, PROMPTS, owners, ids, mask, samples=0, max_response=LIMIT)


def test_generation_settings_of_a_model_do_not_filter_its_samples() -> None:
    plain, shipped = copy.deepcopy(tiny_model()), copy.deepcopy(tiny_model())
    settings = {"top_p": 0.3, "min_p": 0.9, "repetition_penalty": 4.0, "no_repeat_ngram_size": 1, "typical_p": 0.2}
    for name, value in settings.items():
        setattr(shipped.generation_config, name, value)
    drawn = [generating(model, eos_token_id=EOS, seed=3)([[2, 3], [4]], [4, 4], 16) for model in (plain, shipped)]
    assert drawn[0] == drawn[1]
    assert len({tuple(ids) for rows in drawn[0] for ids in rows}) > 4

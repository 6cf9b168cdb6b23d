"""A text counts in every spelling; what is left out is bounded and said."""

from contextlib import nullcontext
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as T
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tokencredit.collect.exact import search as exact_search
from tokencredit.collect.exact import spellings as exact_spellings
from tokencredit.collect.exact.spellings import encode_accepted, lattice_of
from tokencredit.collect.exact.values import ExactValues, exact_credit
from tokencredit.errors import TokenCreditError

PROMPT = [2, 3]
TEXTS = ["ab", "bab", "abab"]
LONGEST = 5  # tokens of a response, EOS included


def letters() -> PreTrainedTokenizerFast:
    """a, b, ab and ba: "abab" has eight spellings."""
    vocabulary = {"<pad>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4, "ba": 5}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("b", "a")]))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")


def policy(seed: int = 0) -> Any:
    config = T.LlamaConfig(
        vocab_size=6, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T.LlamaForCausalLM(config).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6.0)
    return model


def every_response() -> list[list[int]]:
    """All responses of at most LONGEST tokens that end."""
    return [[*body, 1] for length in range(LONGEST) for body in product(range(2, 6), repeat=length)]


@torch.no_grad()
def probabilities(model: Any, responses: list[list[int]]) -> torch.Tensor:
    rows = [[*PROMPT, *ids] + [0] * (LONGEST - len(ids)) for ids in responses]
    logprobs = model(input_ids=torch.tensor(rows)).logits.log_softmax(-1)[:, len(PROMPT) - 1 : -1]
    ids = torch.tensor([row[len(PROMPT) :] for row in rows])
    real = torch.tensor([[place < len(row) for place in range(LONGEST)] for row in responses])
    return torch.where(real, logprobs.gather(2, ids[..., None])[..., 0], 0.0).sum(1).exp()


def true_value(model: Any, tokenizer: Any, prefix: list[int] | None = None) -> float:
    prefix = prefix or []
    rows = [ids for ids in every_response() if tokenizer.decode(ids[:-1]) in TEXTS and ids[: len(prefix)] == prefix]
    return float(probabilities(model, rows).sum())


def test_all_spellings_of_a_short_text() -> None:
    tokenizer = letters()
    found = {tuple(ids) for ids in lattice_of(tokenizer, "abab").spellings()}
    # a/b/a/b, ab/a/b, a/ba/b, a/b/ab, ab/ab
    assert found == {(2, 3, 2, 3, 1), (4, 2, 3, 1), (2, 5, 3, 1), (2, 3, 4, 1), (4, 4, 1)}
    listed = encode_accepted(tokenizer, ["abab"])
    assert listed[0] == [*tokenizer("abab")["input_ids"], 1] and len(listed) == 5 and not listed.lattices
    assert len(encode_accepted(tokenizer, ["abab"], max_tokens=4)) == 4  # a/b/a/b does not fit


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_values_are_those_of_all_responses_that_are_accepted(seed: int) -> None:
    tokenizer, model = letters(), policy(seed)
    credit = exact_credit(model, [PROMPT], [encode_accepted(tokenizer, TEXTS)], eos_token_id=1, show=tokenizer.decode)
    assert float(credit.prompt_values[0]) == pytest.approx(true_value(model, tokenizer), rel=1e-6)
    node = credit.trie.walk(0, [2, 3])[-1]  # after a, b
    reached = float(probabilities(model, [[2, 3]])[0])
    assert float(credit.nodes.values[node]) == pytest.approx(true_value(model, tokenizer, [2, 3]) / reached, rel=1e-5)
    assert float(credit.omitted[0]) == 0.0
    one = [[*tokenizer(text)["input_ids"], 1] for text in TEXTS]
    assert float(exact_credit(model, [PROMPT], [one], eos_token_id=1).prompt_values[0]) < true_value(model, tokenizer)


@pytest.mark.parametrize("budget", [0, 4096])
def test_what_is_left_out_is_bounded(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_spellings, "FEW", 0)  # as if every text had too many
    monkeypatch.setattr(exact_search, "BUDGET", budget)
    monkeypatch.setattr(exact_search, "AT_ONCE", 2)
    tokenizer = letters()
    for seed in range(4):
        model = policy(seed)
        listed = encode_accepted(tokenizer, TEXTS, max_tokens=LONGEST)
        assert len(listed) == len(TEXTS) == len(listed.lattices)
        said = nullcontext() if budget else pytest.warns(UserWarning, match="lower bounds for 1 of 2 prompts")
        with said:
            credit = exact_credit(model, [PROMPT, [4]], [listed, [[2, 1]]], eos_token_id=1)
        value, omitted, true = float(credit.prompt_values[0]), float(credit.omitted[0]), true_value(model, tokenizer)
        assert value <= true * (1 + 1e-9) and true <= value + omitted + 1e-12
        assert float(credit.omitted[1]) == 0.0
        if budget:
            assert omitted <= 0.01 * value
        else:
            assert len(credit.trie.paths) == len(TEXTS) + 1


def rollout(model: Any, tokenizer: Any, responses: list[list[int]]) -> SimpleNamespace:
    width = max(map(len, responses))
    mask = torch.tensor([[place < len(ids) for place in range(width)] for ids in responses])
    return SimpleNamespace(
        model=model, tokenizer=tokenizer, temperature=1.0, columns=[{}] * len(responses),
        prompt_ids=torch.tensor([PROMPT] * len(responses)), prompt_mask=torch.ones(len(responses), 2),
        response_ids=torch.tensor([ids + [0] * (width - len(ids)) for ids in responses]), response_mask=mask,
    )  # fmt: skip


def test_another_spelling_of_an_accepted_text_counts() -> None:
    tokenizer, model = letters(), policy()
    values = ExactValues(lambda columns: TEXTS, lambda columns, text: text in TEXTS, max_tokens=LONGEST)
    found = values(rollout(model, tokenizer, [[2, 3, 1], [4, 1], [3, 3, 1]]))  # a/b, ab, b/b
    assert float(found[0, 0]) == pytest.approx(true_value(model, tokenizer), rel=1e-6)
    at_end = float(probabilities(model, [[2, 3, 1]])[0] / probabilities(model, [[2, 3]])[0])
    assert float(found[0, 2]) >= at_end - 1e-9


def test_a_sampled_spelling_joins_a_list_that_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_spellings, "FEW", 0)
    monkeypatch.setattr(exact_search, "BUDGET", 0)
    tokenizer, model = letters(), policy()
    values = ExactValues(lambda columns: TEXTS, lambda columns, text: text in TEXTS, max_tokens=LONGEST)
    with pytest.warns(UserWarning, match="exact values are lower bounds for 1 of 1 prompts"):
        found = values(rollout(model, tokenizer, [[2, 3, 1]]))
    assert float(found[0, 2]) > 0.0  # else all credit would fall on EOS


def test_rewards_of_unlisted_spellings_are_no_contradiction() -> None:
    tokenizer, model = letters(), policy()
    credit = exact_credit(model, [PROMPT], [[[4, 1]]], eos_token_id=1, show=tokenizer.decode)
    ids, mask = torch.tensor([[2, 3, 1]]), torch.ones(1, 3, dtype=torch.bool)
    credit.check_rewards(torch.tensor([0]), ids, mask, torch.tensor([1.0]))
    with pytest.raises(TokenCreditError, match="disagree"):
        credit.check_rewards(torch.tensor([0]), torch.tensor([[3, 3, 1]]), mask, torch.tensor([1.0]))
    cut = torch.tensor([[2, 3, 3]])  # not finished
    with pytest.raises(TokenCreditError, match="disagree"):
        credit.check_rewards(torch.tensor([0]), cut, mask, torch.tensor([1.0]))


def test_lists_of_ids_are_taken_as_they_are() -> None:
    tokenizer = letters()
    assert list(encode_accepted(tokenizer, [[2, 3], [4, 1]])) == [[2, 3, 1], [4, 1]]
    with pytest.raises(TokenCreditError, match="'ab' is listed twice"):
        encode_accepted(tokenizer, ["ab", "ab"])


# -- vocabularies of bytes and of words with spaces ---------------------------------------------------------


def trained(kind: str) -> PreTrainedTokenizerFast:
    corpus = ["the sum is 12", "the end is größer", "sum of 3 and 4"] * 10
    inner = Tokenizer(models.BPE(byte_fallback=kind == "metaspace"))
    special = ["<pad>", "</s>"]
    if kind == "metaspace":
        inner.pre_tokenizer = pre_tokenizers.Metaspace()
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        inner.decoder = decoders.Sequence(parts)
        trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=special)
    else:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    inner.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["metaspace", "bytes"])
@pytest.mark.parametrize("text", ["sum", "is 12", "ö"])
def test_spellings_are_all_sequences_that_decode_to_the_text(kind: str, text: str) -> None:
    tokenizer = trained(kind)
    found = {tuple(ids[:-1]) for ids in lattice_of(tokenizer, text, max_tokens=4).spellings()}
    assert all(tokenizer.decode(list(ids)) == text for ids in found)
    pieces = [number for token, number in tokenizer.get_vocab().items() if number > 1]
    parts = [number for number in pieces if (tokenizer.decode([number]).strip() or " ") in text or text == "ö"]
    brute = {ids for length in (1, 2) for ids in product(parts, repeat=length) if tokenizer.decode(list(ids)) == text}
    assert brute and {ids for ids in found if len(ids) <= 2} == brute


@pytest.mark.parametrize("kind", ["metaspace", "bytes"])
def test_the_tokenizers_own_spelling_is_in_the_lattice(kind: str) -> None:
    tokenizer = trained(kind)
    for text in ("the sum", "größer", "4 and 3"):
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        lattice = lattice_of(tokenizer, text)
        assert tokenizer.eos_token_id in lattice.after(own)
        for stop in range(len(own)):
            assert own[stop] in lattice.after(own[:stop])
        whole = lattice.complete(own[:1])
        assert whole is not None and tokenizer.decode(whole[:-1]) == text and len(whole) <= len(own) + 1

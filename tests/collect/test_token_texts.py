import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tokencredit.collect.token_texts import batch_token_texts, token_texts

CORPUS = ["so the sum of two odd numbers is even", "the end: x = 12, y = 7 .", "größer als die Lösung"] * 20


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Spaces belong to words, unknown characters to bytes, as in Llama 2."""
    inner = Tokenizer(models.BPE(byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(parts)
    special = ["<pad>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    inner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=special[:2]))
    inner.add_tokens(special[2:])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")


def byte_level() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=340, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")


TEXTS = ["so the end: x = 12 .", "größer 漢字 🍓, the end", "一二三", "x"]


@pytest.mark.parametrize("make", [sentencepiece_like, byte_level])
def test_pieces_joined_are_the_text(make: object) -> None:
    tokenizer = make()  # type: ignore[operator]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    for row, pieces in zip(rows, batch_token_texts(tokenizer, rows), strict=True):
        assert len(pieces) == len(row)
        assert "".join(pieces) == tokenizer.decode(row)


def test_a_word_keeps_its_space() -> None:
    tokenizer = sentencepiece_like()
    ids = tokenizer("the sum of the end", add_special_tokens=False)["input_ids"]
    assert "".join(tokenizer.batch_decode([[token] for token in ids])) == "thesumoftheend"  # one by one: lost
    assert "".join(token_texts(tokenizer, ids)) == "the sum of the end"
    assert any(piece.startswith(" ") for piece in token_texts(tokenizer, ids))


def test_a_character_of_several_tokens_goes_to_the_last_of_them() -> None:
    tokenizer = byte_level()
    ids = tokenizer("x漢y", add_special_tokens=False)["input_ids"]  # 漢 is three bytes, none of them merged
    assert token_texts(tokenizer, ids) == ["x", "", "", "漢", "y"]
    assert "".join(token_texts(tokenizer, ids[:3])) == tokenizer.decode(ids[:3])  # a response that was cut inside it


def test_special_tokens_and_empty_rows() -> None:
    tokenizer = byte_level()
    ids = [*tokenizer("so", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert token_texts(tokenizer, ids)[-1] == "</s>"
    assert token_texts(tokenizer, ids, skip_special_tokens=True)[-1] == ""
    assert batch_token_texts(tokenizer, [[], ids[:1]])[0] == []


class Cleaning:
    """A decoder that changes text already shown: a full stop takes the space before it away."""

    words = ("one", "two", ".", "don", "'t")

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(self.words[number] for number in ids).replace(" .", ".").replace(" '", "'")

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(row) for row in rows]


def test_a_tokenizer_that_cleans_up_behind_itself() -> None:
    assert token_texts(Cleaning(), [0, 1, 2]) == ["one", " two", "."]
    assert "".join(token_texts(Cleaning(), [3, 4, 0, 2])) == "don't one."

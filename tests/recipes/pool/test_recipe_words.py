"""Words in any script, and what is counted in words: shingles, entropies, features, lengths."""

from collections.abc import Callable

import numpy as np
import pytest

from tokencredit.recipes.evaluate.ngram import hash_tokens
from tokencredit.recipes.pool.words import count_words, split_tokens, split_words
from tokencredit.recipes.signals.minhash import keep_distinct, shingle
from tokencredit.recipes.signals.text import _log_counts, unigram_entropy

CLAUSES = {
    "chinese": "人工智能正在改变教育的方式，老师和学生都需要学习新的工具，而这件事并不容易，需要很长的时间和许多耐心",
    "japanese": "私たちは毎日新しいことを学びながら、少しずつ前に進んでいます。失敗しても、また立ち上がればよいのです",
    "thai": "การเรียนรู้สิ่งใหม่ๆทุกวันทำให้เราเติบโตขึ้นและเข้าใจโลกใบนี้มากกว่าเดิมเสมอ",
    "khmer": "ការរៀនសូត្ររាល់ថ្ងៃធ្វើឱ្យយើងយល់ពីពិភពលោកកាន់តែច្បាស់ជាងមុន",
    "lao": "ການຮຽນຮູ້ທຸກໆມື້ເຮັດໃຫ້ພວກເຮົາເຂົ້າໃຈໂລກໄດ້ດີຂຶ້ນກວ່າເກົ່າ",
    "burmese": "နေ့စဉ်သင်ယူခြင်းသည်ကမ္ဘာကြီးကိုပိုမိုနားလည်စေပါသည်",
    "mixed": "我用 Python 3 写了一个很小的程序，它可以把很多文件整理好，而且几乎不需要任何说明，非常方便",
}


def kept(texts: list[str], jaccard: float) -> list[bool]:
    return keep_distinct(shingle(texts, len(texts)), np.arange(len(texts), dtype=np.int32), jaccard).tolist()


@pytest.mark.parametrize("text", CLAUSES.values(), ids=CLAUSES)
def test_near_copies_are_found_without_spaces(text: str) -> None:
    assert kept([text, text + "了"], 0.9) == [True, False]
    assert kept([text, text[::-1]], 0.5) == [True, True]
    assert unigram_entropy(text) > 3
    assert count_words(text) > len(text) / 3


def test_words_by_hand() -> None:
    assert split_words("The cat's 3_b") == ["the", "cat", "s", "3_b"]
    assert split_words("我爱AI，真的") == ["我", "爱", "ai", "真", "的"]
    assert split_words("हिन्दी में") == ["हिन्दी", "में"]  # vowel signs belong to the word
    assert split_words("cafe\u0301 noir") == ["cafe\u0301", "noir"]
    assert split_tokens("a,我! b") == ["a", ",", "我", "!", "b"]
    # 一 and 二 are seen once, 三 twice: 2 · ¼ · 2 + ½ · 1
    assert unigram_entropy("一二，三三") == pytest.approx(1.5)


def test_lengths_count_what_spaces_separate() -> None:
    assert count_words("two, words -- here") == 4
    assert count_words("我爱 AI 。") == 4  # two characters, one word, and a mark between spaces
    assert count_words("") == 0


def test_texts_without_words_are_copies_only_of_themselves() -> None:
    assert kept(["...", "🍓🍓", "!?", "...", "🍓 🍓"], 0.9) == [True, True, True, False, False]
    assert kept(["— — —", "***", "a b"], 0.5) == [True, True, True]


@pytest.mark.parametrize("read", [unigram_entropy, _log_counts, lambda text: hash_tokens(text, 64), split_words])
def test_a_lone_surrogate_is_text(read: Callable[[str], object]) -> None:
    assert read("so \ud800 what\udfff") is not None


def test_english_shingles_are_what_they_were() -> None:
    # MinHash signatures of stored pools stay valid where words are separated by spaces
    found = shingle(["the quick brown fox jumps over", "one two"], 2)
    assert np.diff(found.offsets).tolist() == [2, 1]
    assert found.of(1).tolist() == [1944224490317877867]

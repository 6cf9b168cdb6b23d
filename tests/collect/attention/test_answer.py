"""How much the answer attends to what comes before it: which tokens are the answer, and the sum against eager maps."""

import pytest
import torch

from tokencredit.collect.attention.answer import answer_importances, answer_mask
from tokencredit.lab.model import build_model, build_tokenizer


def test_the_answer_is_the_tail_or_what_follows_a_text() -> None:
    mask = torch.ones(4, 8, dtype=torch.bool)
    mask[1, 3:] = False  # three tokens: at most one of them is the answer
    mask[2, 1:] = False  # one token: it is the answer
    mask[3, 2:4] = False  # a hole: tokens 0 1 4 5 6 7 are chosen
    tail = answer_mask(mask, None, None, 4)
    assert [row.nonzero()[:, 0].tolist() for row in tail] == [[4, 5, 6, 7], [2], [0], [5, 6, 7]]
    texts = [list("1+2=3=4."), list("1=2"), ["3"], list("12=34=")]
    after = answer_mask(mask, texts, "=", 4)
    # the last "=" of row 0 is token 5; nothing follows the last one of row 3, so its tail stands
    assert [row.nonzero()[:, 0].tolist() for row in after] == [[6, 7], [2], [0], [5, 6, 7]]
    split = answer_mask(mask[:1], [["a", "##", "##", "#1", "2", "3", "4", "5"]], "####", 4)
    assert split[0].nonzero()[:, 0].tolist() == [3, 4, 5, 6, 7]


def test_the_marker_ends_inside_a_character_of_several_tokens() -> None:
    mask = torch.ones(1, 7, dtype=torch.bool)
    # "x：" in two tokens, then 漢 in three: its first bytes are of the answer
    pieces = ["x", "：", "", "", "漢", "y", "z"]
    assert answer_mask(mask, [pieces], "x：", 1)[0].nonzero()[:, 0].tolist() == [2, 3, 4, 5, 6]
    # the marker itself ends with a character of three tokens
    assert answer_mask(mask, [["x", "", "", "：", "漢", "y", "z"]], "x：", 1)[0].nonzero()[:, 0].tolist() == [4, 5, 6]


def test_a_marker_that_never_occurs_is_said() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.warns(UserWarning, match="none of 2 responses contains 'answer:'"):
        answer_mask(mask, [list("abc"), list("abd")], "answer:", 1)
    answer_mask(mask, [list("a=c"), list("abd")], "=", 1)  # one has it: no warning


def test_importances_are_the_mean_of_the_answers_rows() -> None:
    model = build_model(build_tokenizer("0123456789"), layers=2, width=32, heads=4, seed=1)
    model.set_attn_implementation("eager")
    ids = torch.randint(2, 12, (3, 11), generator=torch.Generator().manual_seed(0))
    seen = torch.ones_like(ids)
    seen[0, :2] = 0  # padded on the left
    answer = torch.zeros(3, 7, dtype=torch.bool)
    answer[:, 5:] = True
    answer[2, 4] = True
    found = answer_importances(model, ids, seen, 4, 7, answer=answer)
    with torch.no_grad():
        maps = model(ids, attention_mask=seen, output_attentions=True).attentions[-1].mean(1)  # [row, query, key]
    for row in range(3):
        wanted = maps[row, 4:][answer[row]].mean(0)[4:]
        torch.testing.assert_close(found[row][~answer[row]], wanted[~answer[row]], rtol=1e-5, atol=1e-6)
    assert bool((found[answer] == 0).all())
    assert bool((found[~answer] > 0).all())

"""What the verl adapter decides without verl: which rows count, how steps are counted, how text is shown."""

import torch

from tokencredit import TokenBatch, assign_credit
from tokencredit.adapters.verl.rows import pack_schedule, read_schedule, scored_rows, steps_done
from tokencredit.collect.token_texts import column_texts, prompt_texts, without_padding
from tokencredit.lab.model import build_tokenizer


def batch(rows: slice, scored: torch.Tensor | None) -> TokenBatch:
    mask = torch.tensor([[True, True], [True, False], [True, True], [False, False]])
    return TokenBatch(
        response_ids=torch.ones(4, 2, dtype=torch.long)[rows],
        response_mask=mask[rows],
        rewards=torch.tensor([1.0, 0.0, 0.0, 1.0])[rows],
        group_ids=torch.zeros(4, dtype=torch.long)[rows],
        scored=scored,
    )


def test_a_rejected_row_moves_no_baseline() -> None:
    whole = batch(slice(None), None)
    scored = scored_rows(whole.response_mask)
    assert scored is not None
    assert scored.tolist() == [True, True, True, False]
    assert scored_rows(whole.response_mask[:3]) is None
    for credit in ("dr_grpo", "rloo", "w_reinforce"):
        found = assign_credit(credit, batch(slice(None), scored))
        torch.testing.assert_close(found[:3], assign_credit(credit, batch(slice(3), None)))
        assert found[3].abs().max() == 0


def test_the_first_step_of_verl_has_none_behind_it() -> None:
    assert [steps_done(step) for step in (0, 1, 2, 50)] == [0, 0, 1, 49]
    assert read_schedule(pack_schedule(0.25, 7)) == {"progress": 0.25, "step": 7}
    assert read_schedule(None) == {}


def test_text_keeps_special_tokens_and_leaves_padding_out() -> None:
    tokenizer = build_tokenizer("0123456789+=")
    ids = torch.tensor(tokenizer(["1+2<eos>", "34<eos><pad>"])["input_ids"])
    mask = ids != tokenizer.pad_token_id
    assert column_texts(tokenizer, ids, mask) == [["1", "+", "2", "<eos>"], ["3", "4", "<eos>", "<pad>"]]
    assert column_texts(tokenizer, ids[:, :0], mask[:, :0]) == [[], []]
    rows = [without_padding(row, tokenizer.pad_token_id) for row in ([0, 0, 5, 0], [1, 5])]
    assert rows == [[5, 0], [1, 5]]
    assert without_padding([0, 0], 0) == []
    assert prompt_texts(tokenizer, [[1, 5]]) == ["<eos>" + tokenizer.decode([5])]

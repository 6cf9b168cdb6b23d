"""The exact success probability of a model on an enumerable task."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tokencredit.lab.supervised import collate
from tokencredit.lab.tasks import Problem, Task

ROWS = 256  # responses per forward pass


@torch.no_grad()
def success_probability(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, problems: list[Problem]
) -> Float[Tensor, " problems"]:
    """What sampling at temperature 1 would earn, without sampling.

    V(x) = Σ_c π(c · EOS | x)   over the accepted responses c of problem x

    The forward passes run on the model's device; the values come back on the CPU.
    """
    rows = [(index, problem, text) for index, problem in enumerate(problems) for text in task.accepted(problem)]
    device = next(model.parameters()).device  # a trainer has moved the model to its GPU; `collate` works on the CPU
    values = torch.zeros(len(problems), dtype=torch.float64)
    model.eval()
    for start in range(0, len(rows), ROWS):
        indices, asked, texts = zip(*rows[start : start + ROWS], strict=True)
        input_ids, response_mask = (tensor.to(device) for tensor in collate(tokenizer, list(asked), list(texts)))
        logprobs = model(input_ids=input_ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        chosen = logprobs.gather(-1, input_ids[:, 1:, None]).squeeze(-1)  # [rows, length - 1]
        totals = torch.where(response_mask[:, 1:], chosen, 0.0).double().sum(1)
        values.index_add_(0, torch.tensor(indices), totals.exp().cpu())
    return values

"""Exact success of a model that lives on a GPU, on the suite's pretend CUDA device."""

from typing import Any

import pytest
import torch
from torch import nn

from tokencredit.lab.model import build_model, build_tokenizer
from tokencredit.lab.success import success_probability
from tokencredit.lab.tasks import get_task

fakecuda = pytest.importorskip("support.fakecuda", reason="the pretend CUDA device needs g++ and ninja")


def move_to_pretend_cuda(model: nn.Module) -> Any:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(fakecuda.cuda(parameter.data), requires_grad=False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else fakecuda.cuda(buffer)
    return model


def test_success_is_measured_on_the_models_device() -> None:
    task = get_task("countdown")
    tokenizer = build_tokenizer(task.alphabet)
    model = build_model(tokenizer, layers=1, width=16, heads=2, seed=1)
    model.set_attn_implementation("eager")
    problems = task.problems("test", 3)
    expected = success_probability(model, tokenizer, task, problems)
    with fakecuda.session():  # a tensor of the CPU in an operation with one of the device raises, as on CUDA
        found = success_probability(move_to_pretend_cuda(model), tokenizer, task, problems)
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)

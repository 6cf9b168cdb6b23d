import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tokencredit.lab.fused import _RMSNorm, fuse_norms
from tokencredit.lab.model import build_model, build_tokenizer
from tokencredit.lab.sampler import is_lab_model, unsupported

TINY = {
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def test_gradient_of_the_norm_is_that_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: _RMSNorm.apply(x, w, 1e-3), (x, weight))


def test_norm_by_hand() -> None:
    # mean(3², 4²) = 12.5, 1/√12.5 = 0.282843; times weights 1 and 2
    out = _RMSNorm.apply(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), 0.0)
    torch.testing.assert_close(out, torch.tensor([[0.848528, 2.262742]]))


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_fused_model_has_the_same_loss_and_gradients(family: str) -> None:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**TINY)) if family == "qwen3" else LlamaForCausalLM(LlamaConfig(**TINY))
    ids = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(0))
    results = []
    names = list(model.state_dict())
    for fuse in (False, True):
        if fuse:
            fuse_norms(model)
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    assert sum(type(m).__name__.startswith("Fused") for m in model.modules()) == (9 if family == "qwen3" else 5)
    assert list(model.state_dict()) == names
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-6)


def test_the_labs_sampler_reads_a_fused_lab_model() -> None:
    tokenizer = build_tokenizer("0123456789+=")
    model = build_model(tokenizer, layers=1, width=16, heads=2, seed=0)
    fuse_norms(model)
    assert is_lab_model(model)
    assert unsupported(model) is None

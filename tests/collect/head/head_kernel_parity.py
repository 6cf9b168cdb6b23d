"""Under TRITON_INTERPRET=1: the head by its kernels against float64 logits; prints the largest relative errors."""

import torch

from tokencredit.collect.head import fused, gemm
from tokencredit.collect.head.logprobs import head_logprobs
from tokencredit.collect.head.tiles import PLAIN, Readout

TOKENS, WIDTH, VOCAB = 5, 12, 70
READOUTS = [PLAIN, Readout(temperature=0.7), Readout(temperature=1.3, scale=0.5, softcap=3.0)]


def score(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, readout: Readout
) -> tuple[torch.Tensor, torch.Tensor]:
    return head_logprobs(hidden, weight, targets, readout=readout)


def oracle(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, readout: Readout
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = hidden.double() @ weight.double().T * readout.scale
    if readout.softcap is not None:
        logits = readout.softcap * torch.tanh(logits / readout.softcap)
    logprobs = torch.log_softmax(logits / readout.temperature, -1)
    return logprobs.gather(1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    gemm.TILE, fused.BLOCK = 32, 16  # three tiles, the last of six entries; two programs per row
    hidden, weight = torch.randn(TOKENS, WIDTH, generator=generator), torch.randn(VOCAB, WIDTH, generator=generator)
    targets = torch.tensor([0, 31, 32, 69, 40])
    hidden[3] = weight[69] * 4.0  # a confident token
    for readout in READOUTS:
        for entropy in (0.0, 1.0):
            results = []
            for function in (score, oracle):
                leaves = [part.clone().requires_grad_() for part in (hidden, weight)]
                values = function(*leaves, targets, readout)
                loss = (values[0] * torch.arange(1.0, 6.0)).sum() + entropy * (values[1] * torch.arange(5.0)).sum()
                results.append([*(value.detach() for value in values), *torch.autograd.grad(loss, leaves)])
            errors = [float(((one - two) / two.abs().max()).abs().max()) for one, two in zip(*results, strict=True)]
            digits = float(((results[0][0] - results[1][0]) / results[1][0]).abs().max())
            print(f"{readout.temperature} {entropy}: {max(*errors, digits):.2e}")
    assert fused.fits(hidden)


if __name__ == "__main__":
    main()

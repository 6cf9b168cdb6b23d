"""Under TRITON_INTERPRET=1: every statistic from the fused kernels against the blocks; prints the largest errors."""

import sys

import torch

from tokencredit.collect.attention import fused
from tokencredit.collect.attention.parts import AttentionRows, Visibility
from tokencredit.collect.attention.rhythms import head_maps
from tokencredit.collect.attention.rows import head_entropies, row_statistics

T, ROWS = 70, slice(11, 68)
CAUSAL = torch.ones(T, T, dtype=torch.bool).tril()
PACKED = torch.tensor([0] * 30 + [1] * 40)
PLACE = torch.arange(T)
PLANES = {
    "causal": None,
    "window of 20": (CAUSAL & ~CAUSAL.tril(-20))[None],
    "chunks of 16": (CAUSAL & (PLACE[:, None] // 16 == PLACE[None] // 16))[None],
    "padding on the left": torch.stack([CAUSAL, CAUSAL & (PLACE >= 19)]),
    "padding on the right": torch.stack([CAUSAL, CAUSAL & (PLACE < 50)]),
    "two packed sequences": (CAUSAL & (PACKED[:, None] == PACKED[None]))[None],
}
KINDS = [(torch.float32, 32, None), (torch.bfloat16, 80, None), (torch.float32, 24, 5.0)]


def visibility_of(plane: torch.Tensor | None) -> Visibility:
    if plane is None:
        return Visibility()
    return Visibility(lambda sequence, rows: plane.expand(2, T, T)[sequence][..., rows, :])


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    dtype, width, softcap = KINDS[int(sys.argv[1])]
    query = (torch.randn(2, 6, T, width, generator=generator) * 2).to(dtype)
    key = (torch.randn(2, 2, T, width, generator=generator) + torch.randn(1, 2, 1, width, generator=generator)).to(
        dtype
    )
    options = {"scale": 0.2, "softcap": softcap, "rows": ROWS}

    def everything(visibility: Visibility) -> list[torch.Tensor]:
        found = [head_entropies(query, key, visibility, **options), *head_maps(query, key, visibility, **options)]
        for more in ({}, {"drop_sink": 2}, {"heads": "mean_entropy"}, {"context": "total"}):
            found += row_statistics(query, key, visibility, **options, **more)
        return found

    names = ["window of 20", "padding on the left"] if int(sys.argv[1]) == 0 else list(PLANES)
    for name in names:
        plane = PLANES[name]
        assert fused.fused_intervals(AttentionRows(query, key, visibility_of(plane), 1.0, rows=ROWS)) is not None, name
        by_kernels = everything(visibility_of(plane))
        with_blocks = fused.fits
        fused.fits = lambda *_: False  # type: ignore[assignment]
        by_blocks = everything(visibility_of(plane))
        fused.fits = with_blocks  # type: ignore[assignment]
        errors = [float((one - two).abs().max()) for one, two in zip(by_kernels, by_blocks, strict=True)]
        print(f"{name}: {max(errors):.2e}")


if __name__ == "__main__":
    main()

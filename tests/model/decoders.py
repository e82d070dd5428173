"""Decoders, of a folder or of random weights; experts that do something, texts to read."""

from pathlib import Path

import torch
from torch import Tensor

from model import weights
from model.config import DecoderConfig
from model.lora import LinearGroup, LoRAConfig
from model.transformer import Decoder

LENGTHS = (1, 4, 9, 9, 17)
THREE = LoRAConfig(("embedding", "reranking", "shared"), (2, 3, 1), (4.0, 6.0, 2.0))


def texts(vocabulary: int = 120, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths]


def load(folder: Path, *args, layers: int | None = None, causal: bool = True, **kwargs) -> Decoder:
    config = DecoderConfig.read(folder, layers, causal)
    decoder = Decoder(config, *args, **kwargs)
    kept = tuple(f"model.layers.{i}." for i in range(config.num_hidden_layers))
    weights.load_into(
        folder,
        decoder.named_weights(),
        ignore=lambda name: name == "lm_head.weight" or not name.startswith(kept),
    )
    return decoder


def fill_lora(decoder: Decoder, seed: int = 0) -> None:
    """Give B values too: with B = 0 the experts would do nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for group in decoder.modules():
            if isinstance(group, LinearGroup):
                for name in group.adapted_names:
                    a, b = group.lora_A[name], group.lora_B[name]
                    a.copy_(torch.randn(a.shape, generator=generator) * a.shape[1] ** -0.5)
                    b.copy_(torch.randn(b.shape, generator=generator) * 0.3)


def check(ours: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance * scale)


def decoder(
    family: str, lora, router, dtype, device: str, fused: bool, window: int | None = None, **options
) -> Decoder:
    """The same random weights for the same arguments, whatever the path, device and dtype."""
    shape = DecoderConfig(
        family, 32, 48, 2, 4, 2, 16, 50, 1e-5, 1e4, sliding_window=window, **options
    )
    with torch.device(device):
        made = Decoder(shape, lora, router, dtype, fused=fused)
    generator = torch.Generator().manual_seed(1)

    def values(t: Tensor, scale: float, mean: float = 0.0) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=torch.float64) * scale + mean

    with torch.no_grad():
        for _, t in sorted(made.named_weights().items()):
            t.copy_(values(t, 0.2) if t.ndim > 1 else values(t, 0.3, 1.0))
        for name, p in sorted(made.named_parameters()):
            if p.requires_grad:
                p.copy_(values(p, 0.2) if not name.endswith("router.v") else values(p, 0.1, 1.0))
    return made

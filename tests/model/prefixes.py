"""A model whose experts begin at a later layer, and the states that enter it."""

from pathlib import Path

import torch
from torch import Tensor

from model.lora import LinearGroup, LoRAConfig
from model.prefix import PrefixStates, prefix_states
from model.router import RouterConfig
from model.unimoer import ModelConfig, UniMoER

FIRST = 2
LORA = LoRAConfig(("a", "b"), (2, 3), (4.0, 6.0), first_layer=FIRST)
TEXTS = ["Paris", "the capital of France", "yes", "", "def read(path): return the text", "no no"]


def make_model(base: Path, dtype: str = "float32", first: int = FIRST) -> UniMoER:
    lora = LoRAConfig(LORA.experts, LORA.ranks, LORA.alphas, first_layer=first)
    made = UniMoER(ModelConfig(base=str(base), lora=lora, router=RouterConfig(), dtype=dtype))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for group in made.modules():
            if isinstance(group, LinearGroup):
                for b in group.lora_B.values():
                    b.copy_(0.3 * torch.randn(b.shape, generator=generator))
    return made


def all_rows(states: PrefixStates, dtype: torch.dtype = torch.float32) -> Tensor:
    return states.rows(range(len(TEXTS)), dtype)


def build(
    model: UniMoER, ids: list[list[int]], folder: Path | None, identity: str = "x", **options
) -> PrefixStates:
    return prefix_states(model.decoder, ids, identity, folder, **options)

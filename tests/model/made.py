"""Models that do something although nobody has trained them."""

from dataclasses import replace
from pathlib import Path

import torch

from model.lora import LoRAConfig
from model.router import RouterConfig
from model.unimoer import ModelConfig, UniMoER

LORA = LoRAConfig(("embedding", "reranking", "shared"), (4, 3, 2), (8.0, 6.0, 4.0), first_layer=1)
TEXTS = ["Paris", "the capital of France", "", "yes", "def read(path): return the text", "Paris"]
QUERY = "what is the capital of France?"
A_NAME = "decoder.layers.1.self_attn.qkv.lora_A.q_proj"


def make(base: Path, **changes: object) -> UniMoER:
    """An untrained model, moved away from its start: experts, routers and head do something."""
    config = ModelConfig(base=str(base), lora=LORA, router=RouterConfig(), document_tokens=32)
    model = UniMoER(replace(config, **changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.trained().values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.2 * noise.to(parameter))
    return model

"""A document of 100,000 tokens, in whatever way it is reranked: it is read as far as the limit."""

from pathlib import Path

import pytest
import torch

from model.lora import LoRAConfig
from model.router import RouterConfig
from model.unimoer import ModelConfig, UniMoER

LORA = LoRAConfig(("embedding", "reranking"), (4, 3), (8.0, 6.0), first_layer=1)
LONG = "ba ko mi " * 33_334
HEADS = ("linear", "yes_no", "interaction", "pseudo_query")


@pytest.mark.parametrize("head", HEADS)
def test_a_document_of_100000_tokens_is_cut(tiny_base: Path, head: str) -> None:
    config = ModelConfig(
        base=str(tiny_base), lora=LORA, router=RouterConfig(), document_tokens=40, list_tokens=400,
        rerank_head=head,
    )  # fmt: skip
    model = UniMoER(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.trained().values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    assert len(model.tokenizer.fast.encode(LONG).ids) >= 100_000
    scores = [dict(model.rank("ba mi", ["ko", text, ""])) for text in (LONG, LONG[:3000])]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert len(set(scores[0].values())) == 3  # the head tells the three apart

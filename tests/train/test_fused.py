"""The training loop on the kernels: the losses and the parameters of the PyTorch path."""

from dataclasses import replace

import pytest
import torch

from eval.collections import load
from tests.kernels.compare import error
from tests.train.tiny import NOISY_MOE, build, tiny_config, write_collection
from train.loop import train
from train.trial import repeatable

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_collection(tmp_path_factory.mktemp("fused") / "tiny")


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_losses_on_either_path(tiny_base, data, tmp_path, device: str) -> None:
    """Router noise, expert dropout, clipping and AdamW included; dropout draws apart, so not it."""
    small = {"layers": 3, "embedding_batch": 2, "reranking_batch": 1, "document_tokens": 8}
    config = tiny_config(tiny_base, data, steps=2, **{**NOISY_MOE, "lora_dropout": 0.0, **small})
    found = {}
    for kernels in ("torch", "triton"):
        model, batches = build(config, load(str(data)), device, kernels)
        log = train(model, batches, config, tmp_path / kernels)
        parameters = {name: p.detach().double().cpu() for name, p in model.trained().items()}
        found[kernels] = (log, parameters)
    for plain, fused in zip(found["torch"][0], found["triton"][0], strict=True):
        for key in ("loss_embedding", "loss_reranking", "loss_balance", "gradient_norm"):
            assert fused[key] == pytest.approx(plain[key], rel=1e-3), key
    plain, fused = (torch.cat([p.flatten() for p in found[k][1].values()]) for k in found)
    assert error(fused, plain) < 1e-3


@pytest.mark.gpu
def test_the_same_seed_gives_the_same_bits_on_a_card(tiny_base, data, tmp_path) -> None:
    repeatable()
    config = replace(tiny_config(tiny_base, data, **NOISY_MOE), dtype="float16")
    logs = []
    for turn in range(2):
        model, batches = build(config, load(str(data)), "cuda")
        logs.append(train(model, batches, config, tmp_path / str(turn)))
    assert logs[0] == logs[1]

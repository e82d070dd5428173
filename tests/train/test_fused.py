"""The training loop on the kernels: the losses and the parameters of the PyTorch path."""

import json
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eval.collections import load
from tests.kernels.compare import error
from tests.train.tiny import NOISY_MOE, build, tiny_config, write_collection
from train.loop import _backward, train
from train.trial import repeatable

LAST_IN_PARTS = {
    "embedding_pooling": "last", "reranking_pooling": "last", "cached_tokens": 30,
}  # fmt: skip
# The balance loss goes back by itself, from the upper router through the lower one's layer.
PCGRAD = {"pcgrad": True, "adapter_layers": 1}
TOKENS = {"per_token": True, "expert_dropout": 0.0}  # routed in the kernel
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_collection(tmp_path_factory.mktemp("fused") / "tiny")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "changes", [{}, LAST_IN_PARTS, PCGRAD, PCGRAD | TOKENS],
    ids=["whole", "parts", "pcgrad", "pcgrad of tokens"],
)  # fmt: skip
def test_the_same_losses_on_either_path(
    tiny_base, data, tmp_path, device: str, changes: dict[str, Any]
) -> None:
    """Router noise, dropout, expert dropout, clipping and AdamW included; also where the last layer
    is run for one token of each text, and in parts."""
    small = {"layers": 3, "embedding_batch": 2, "reranking_batch": 1, "document_tokens": 8}
    config = tiny_config(tiny_base, data, steps=2, **{**NOISY_MOE, **small, **changes})
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


@pytest.fixture
def as_in_a_run() -> Iterator[None]:
    """`repeatable`, for one test."""
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    repeatable()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


@pytest.mark.gpu
def test_the_same_seed_gives_the_same_bits_on_a_card(tiny_base, tmp_path, as_in_a_run) -> None:
    """Of long texts too: only from three blocks of keys on does attention's order matter."""
    data = write_collection(tmp_path / "long")
    lines = (data / "corpus.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    long = [json.dumps(row | {"text": " ".join([row["text"]] * 200)}) for row in rows]
    (data / "corpus.jsonl").write_text("\n".join(long) + "\n")
    for router in ("sparsegen", "entmax15", "tsallis"):
        changes = {**NOISY_MOE, "router": router, "document_tokens": 400}
        config = replace(tiny_config(tiny_base, data, **changes), dtype="float16")
        logs = []
        for turn in range(2):
            model, batches = build(config, load(str(data)), "cuda")
            logs.append(train(model, batches, config, tmp_path / f"{router}{turn}"))
        assert max(batches.reranking_texts.lengths) > 350
        assert logs[0] == logs[1]


def test_backward_insists_on_deterministic_algorithms() -> None:
    seen = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, *grads):
            seen.append(torch.is_deterministic_algorithms_warn_only_enabled())
            return grads[0]

    def went_back() -> None:
        x = torch.ones(2, requires_grad=True)
        _backward(Watch.apply(x).sum(), carries=[lambda: seen.append("carried")],
                  parameters=[x], held=held, scale=8.0)  # fmt: skip
        assert x.grad is not None and x.grad.tolist() == [1, 1]

    held: Any = SimpleNamespace(clear=lambda: None)
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        went_back()
        assert seen == [False, "carried"]
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    went_back()
    assert not torch.are_deterministic_algorithms_enabled()


def test_small_gradients_survive_16_bits(tiny_base, data, tmp_path) -> None:
    """Of losses that weigh 1e-7, on the PyTorch path: as large as those of fp32 are."""
    norms = {}
    for dtype in ("float32", "float16"):
        weights = {"embedding_weight": 1e-7, "reranking_weight": 1e-7}
        config = replace(tiny_config(tiny_base, data, steps=1, **weights), dtype=dtype)
        model, batches = build(config, load(str(data)))
        [line] = train(model, batches, config, tmp_path / dtype)
        norms[dtype] = line["gradient_norm"]
    assert norms["float16"] == pytest.approx(norms["float32"], rel=0.02)

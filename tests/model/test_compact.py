"""What is left of a model for serving: the same results from fewer bytes, and no way back."""

from pathlib import Path

import pytest
import torch

from model.prefix import TextSet
from model.unimoer import UniMoER
from tests.model.made import QUERY, TEXTS, make


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_compact_serves_the_same_and_saves_no_more(
    tiny_base: Path, tmp_path: Path, kernels: str
) -> None:
    """To rounding: a GEMM adds up in another order where the rows of its matrix lie otherwise."""
    trained = make(tiny_base)
    model = UniMoER(trained.config, kernels=kernels)
    model.load_trained(trained.trained(), "test")
    texts = TextSet(model.tokenizer.documents(TEXTS))

    def results() -> list[torch.Tensor]:
        pairs = [(QUERY, text) for text in TEXTS]
        return [model.encode(TEXTS), model.predict(pairs), model.embed_all(texts, base=True)]

    def held() -> int:
        tensors = [*model.parameters(), *model.buffers()]
        return sum(t.numel() * t.element_size() for t in tensors)

    before, size = results(), held()
    experts = sum(p.numel() for name, p in model.trained().items() if "lora_" in name)
    assert model.compact() is model and model.compact() is model
    for a, b in zip(results(), before, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert held() < size - 4 * experts  # the masters, and the zeros of M
    with pytest.raises(ValueError, match="save before it"):
        model.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_bare_model_has_nothing_to_drop(tiny_base: Path, tmp_path: Path) -> None:
    model = make(tiny_base, lora=None, router=None)
    before = model.encode(TEXTS)
    assert torch.equal(model.compact().encode(TEXTS), before)
    model.save_pretrained(tmp_path)
    assert torch.equal(UniMoER.from_pretrained(tmp_path).encode(TEXTS), before)

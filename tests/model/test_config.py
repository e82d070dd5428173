"""model/config.py: what is read of a config.json, and what no decoder is made of."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import DecoderConfig
from model.packed import pack
from model.transformer import Decoder
from tests.model.decoders import THREE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type is 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope type is 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "key 'low_freq_factor'"),
        ({"model_type": "qwen3", "use_sliding_window": True}, "use_sliding_window"),
        ({"intermediate_size": None}, "intermediate_size"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "quantization_config is .'quant_method",
        ),
    ],
)
def test_configs_that_are_not_implemented(
    tiny_base: Path, tmp_path: Path, change: dict, message: str
) -> None:
    raw = json.loads((tiny_base / "config.json").read_text()) | change
    raw = {key: value for key, value in raw.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message) as error:
        DecoderConfig.read(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_llama_3_frequencies_are_those_of_transformers(
    make_base: Callable[..., Path], key: str
) -> None:
    """Both ways to write them, with Llama 3.2's own numbers, at positions up to its 131,072."""
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    theta = {"rope_theta": 500000.0}
    written = {key: rope, **theta} if key == "rope_scaling" else {key: rope | theta}
    folder = make_base(head_dim=64, max_position_embeddings=131072)
    raw = json.loads((folder / "config.json").read_text())
    del raw["rope_theta"]
    (folder / "config.json").write_text(json.dumps(raw | written))
    read = DecoderConfig.read(folder)
    assert read.rope_theta == 500000.0
    batch = pack([[1] * 4096])
    batch = replace(batch, positions=torch.arange(0, 131072, 32))
    found = Decoder(read).rope_table(batch, torch.float32)
    config: Any = AutoConfig.from_pretrained(folder)
    theirs = LlamaRotaryEmbedding(config)(torch.zeros(1), batch.positions[None])
    for ours, other in zip(found, theirs, strict=True):
        # An angle of 131,072 has steps of 2^-7 in float32, and the two round differently.
        torch.testing.assert_close(ours, other[0, :, :32], rtol=0, atol=0.02)
        assert (ours - other[0, :, :32]).pow(2).mean().sqrt() < 2e-3
    plain = Decoder(replace(read, rope=None)).rope_table(batch, torch.float32)
    assert (found[0] - plain[0]).abs().max() > 1


@pytest.mark.parametrize("layers", [0, -1, 5])
def test_more_layers_than_there_are(tiny_base: Path, layers: int) -> None:
    with pytest.raises(ValueError, match="ask for 1 to 4"):
        DecoderConfig.read(tiny_base, layers)


@pytest.mark.parametrize("first", [-1, 4])
def test_experts_above_the_last_layer(tiny_base: Path, first: int) -> None:
    with pytest.raises(ValueError, match="layers 0 to 3"):
        Decoder(DecoderConfig.read(tiny_base), replace(THREE, first_layer=first))


@pytest.mark.parametrize(
    ("family", "change"), [("mistral", {}), ("mistral", {"sliding_window": None}),
                           ("mistral", {"sliding_window": 7}), ("llama", {"sliding_window": 7})]
)  # fmt: skip
def test_windows_as_transformers_has_them(
    make_base: Callable[..., Path], family: str, change: dict
) -> None:
    from transformers import AutoConfig

    folder = make_base(model_type=family)
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("sliding_window", None)
    (folder / "config.json").write_text(json.dumps(raw | change))
    read = DecoderConfig.read(folder).sliding_window
    expected = getattr(AutoConfig.from_pretrained(folder), "sliding_window", None)
    assert read == (expected if family == "mistral" else None)


def test_qwen3_window_counts_only_when_switched_on(make_base: Callable[..., Path]) -> None:
    """Qwen's config.json names a window that is not in use."""
    folder = make_base(model_type="qwen3", sliding_window=3, use_sliding_window=False)
    assert DecoderConfig.read(folder).sliding_window is None

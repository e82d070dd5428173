"""model/config.py: what is read of a config.json, and what no decoder is made of."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from model.config import DecoderConfig
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

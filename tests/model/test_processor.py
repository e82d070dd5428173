"""model/processor.py: which dtype `auto` is."""

import pytest
import torch

from model import processor


def test_what_is_named_is_taken():
    assert processor.resolve_dtype("float16", "cpu") == "float16"


@pytest.mark.parametrize("supported", [True, False])
def test_a_card_that_only_emulates_bfloat16_takes_float16(supported: bool, monkeypatch):
    """As a T4 does, of which PyTorch says by default that it supports it."""
    asked = []

    def is_supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return supported

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    dtype = processor.resolve_dtype("auto", "cuda:0")
    assert (dtype, asked) == ("bfloat16" if supported else "float16", [False])


@pytest.mark.parametrize(
    ("make", "avx", "amx", "expected"),
    [
        ("AMD EPYC 9R14", True, False, "bfloat16"),
        ("Intel(R) Xeon(R) Processor", True, True, "bfloat16"),
        ("Intel(R) Xeon(R) Processor", True, False, "float32"),
        ("AMD EPYC 7B13", False, False, "float32"),
    ],
)
def test_auto_takes_bfloat16_where_it_is_faster(make, avx, amx, expected, monkeypatch):
    """There are processors with instructions for it that run it at half the speed of float32."""
    monkeypatch.setattr(processor, "name", lambda: make)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert processor.resolve_dtype("auto", "cpu") == expected

"""The count of what analyses need: by hand, and against what autograd really keeps."""

from dataclasses import replace

import pytest

from bench import analyses
from bench.shapes import SHAPES, lora_parameters
from model.config import DecoderConfig

TINY = DecoderConfig("qwen3", 64, 128, 2, 4, 2, 16, 32, 1e-6, 1e6, True)


def test_what_a_layer_keeps_grows_with_its_width_and_not_with_the_texts() -> None:
    """At the least x, q, k, v, gate and up; with checkpointing the two that enter it."""
    d, q, kv, f = 64, 64, 32, 128
    kept = analyses.saved_per_token(TINY)
    least = 2 * (2 * d + q + 2 * kv + 2 * f)
    assert least < kept < 12 * least
    assert analyses.saved_per_token(TINY, tokens=384) == pytest.approx(kept, rel=0.1)
    assert analyses.saved_per_token(TINY, checkpointing=True) == pytest.approx(4 * d, rel=0.2)
    # Of each value more in the gate and up projections, these two at the least, in 16 bit
    wider = analyses.saved_per_token(replace(TINY, intermediate_size=2 * f))
    assert 2 * 2 * f <= wider - kept < kept
    wide = replace(TINY, hidden_size=2 * d, head_dim=32, intermediate_size=2 * f)
    # Twice in all, but for what the ranks and the router keep, whose size is the same
    assert 1.5 * kept < analyses.saved_per_token(wide) < 2 * kept
    checkpointed = analyses.saved_per_token(wide, checkpointing=True)
    assert checkpointed == pytest.approx(2 * 4 * d, rel=0.2)


def test_qwen3_fits_24_gb() -> None:
    found = analyses.count(SHAPES["qwen3-0.6b"], checkpointing=True)
    assert found["gradients of the probes"] == 4 * 4 * 48 * lora_parameters(SHAPES["qwen3-0.6b"])
    assert sum(found.values()) < analyses.CARD

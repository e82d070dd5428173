"""The conversion of a GGUF file: weights, tokenizer, what cannot be converted."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from model import bases, weights
from tests.model.gguf_file import HEAD, HIDDEN, KV, TEXTS, TOKENS, permute, truth, write_gguf


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_unpermute_by_hand():
    """One head of 6 rows, then two of 2 pairs: pairs (0, 3), (1, 4), (2, 5) were neighbours."""
    rows = np.array([[0.0], [3.0], [1.0], [4.0], [2.0], [5.0]])
    assert bases.unpermute(rows, 1).ravel().tolist() == [0, 1, 2, 3, 4, 5]
    rows = np.array([[0.0], [2.0], [1.0], [3.0], [10.0], [12.0], [11.0], [13.0]])
    assert bases.unpermute(rows, 2).ravel().tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    weight = np.random.default_rng(0).normal(size=(24, 5))
    assert np.array_equal(bases.unpermute(permute(weight, 3), 3), weight)


def test_conversion_of_a_tiny_file(tmp_path, tiny):
    bases.convert_gguf(tiny, tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(bases.FILES)
    got = load_file(tmp_path / "model.safetensors")
    want = truth()
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert value.dtype is torch.float16
        if "embed" in name:  # Q8_0 rounds to 1/127 of the largest of 32
            assert (value.float() - torch.from_numpy(want[name])).abs().max() < 2 / 127
        else:
            assert torch.equal(value.float(), torch.from_numpy(want[name])), name
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["head_dim"] == HEAD and config["num_key_value_heads"] == KV
    assert config["rms_norm_eps"] == 1e-5 and config["rope_theta"] == 1e5
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert config["tie_word_embeddings"] is True and config["vocab_size"] == len(TOKENS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.isfinite(model(torch.arange(9)[None]).logits).all()


def test_tokenizer_of_a_tiny_file(tmp_path, tiny):
    bases.convert_gguf(tiny, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab() == {token: i for i, token in enumerate(TOKENS)}
    assert tokenizer.encode("the the12<|im_end|>").tokens == [
        *("t", "he", "Ġthe", "1", "2", "<|im_end|>")
    ]  # digits stay single although a merge of them exists
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.encode("").ids == []  # nothing is added


def test_untied_output(tmp_path):
    head = {"output.weight": np.ones((len(TOKENS), HIDDEN), np.float32)}
    bases.convert_gguf(write_gguf(tmp_path / "x.gguf", extra=head), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in weights.read_header(tmp_path / "model.safetensors")


def test_what_cannot_be_converted_is_named(tmp_path):
    with pytest.raises(ValueError, match="'qwen2', 'gpt2', 'smollm'"):
        bases.convert_gguf(write_gguf(tmp_path / "a.gguf", arch="qwen2"), tmp_path)
    odd = {"blk.0.attn_q.bias": np.ones(4, np.float32)}
    with pytest.raises(ValueError, match="blk.0.attn_q.bias in .*b.gguf has no place"):
        bases.convert_gguf(write_gguf(tmp_path / "b.gguf", extra=odd), tmp_path)
    large = truth()
    large["model.norm.weight"][3] = 7e4
    with pytest.raises(ValueError, match="output_norm.weight .*float16 cannot hold"):
        bases.convert_gguf(write_gguf(tmp_path / "c.gguf", large), tmp_path)
    assert not list(tmp_path.glob("*.json"))

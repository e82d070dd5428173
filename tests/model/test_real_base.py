"""The default base itself, as its authors published it, against transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from model import bases, weights
from tests.model.gguf_file import SPECIAL, TEXTS


@pytest.fixture(scope="module")
def smollm():
    try:
        return bases.resolve(bases.DEFAULT)
    except ValueError as error:
        pytest.skip(f"the default base is not cached and cannot be fetched: {error}")


def test_smollm_is_what_its_authors_published(smollm):
    config = json.loads((smollm / "config.json").read_text())
    want = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    want |= {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    want |= {"rms_norm_eps": 1e-5, "rope_theta": 1e5, "vocab_size": 49152, "model_type": "llama"}
    want |= {"tie_word_embeddings": True, "max_position_embeddings": 8192}
    want |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert {key: config[key] for key in want} == want
    header = weights.read_header(smollm / "model.safetensors")
    assert sum(np.prod(info.shape) for info in header.values()) == 134_515_008
    assert {info.dtype for info in header.values()} == {"F16"} and len(header) == 272
    assert bases.identity(smollm)["name"] == bases.DEFAULT


def test_smollm_tokenizer(smollm):
    tokenizer = Tokenizer.from_file(str(smollm / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(smollm)
    assert [tokenizer.token_to_id(token) for token in SPECIAL] == [0, 1, 2]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)
    assert tokenizer.get_vocab_size() == 49152
    assert tokenizer.encode("The capital of France is").ids == [504, 3575, 282, 4649, 314]
    assert tokenizer.encode("in 2024").tokens == ["in", "Ġ", "2", "0", "2", "4"]
    for text in [*TEXTS, Path(__file__).read_text(encoding="utf-8")]:
        ids = tokenizer.encode(text).ids
        assert theirs(text)["input_ids"] == ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_smollm_speaks(smollm):
    """A check of the conversion: a wrong permutation of q or k, or a transposed weight, would
    leave a model that runs and babbles."""
    model = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(smollm / "tokenizer.json"))
    ids = tokenizer.encode("The capital of France is").ids
    with torch.no_grad():
        best = model(torch.tensor([ids])).logits[0, -1].argmax()
    assert tokenizer.decode([int(best)]) == " Paris"

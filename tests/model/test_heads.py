"""Pooling by hand, and the two relevance heads."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from model.heads import LinearScore, YesNoScore, check_pooling, pool, run_pooled, truncate
from model.packed import Only, pack
from model.unimoer import ModelConfig, UniMoER

BATCH = pack([[5, 6, 7], [8], [9, 10]])
HIDDEN = torch.tensor([[1.0, 0.0], [2.0, 2.0], [3.0, 4.0], [6.0, 8.0], [0.0, 5.0], [4.0, 3.0]])
PAIRS = [("what is it", "a pen"), ("who", "Paris is the capital of France."), ("x", "")]


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("last", [[3, 4], [6, 8], [4, 3]]),
        ("first", [[1, 0], [6, 8], [0, 5]]),
        ("mean", [[2, 2], [6, 8], [2, 4]]),
    ],
)
def test_pooling_by_hand(pooling: str, expected: list[list[float]]) -> None:
    assert pool(HIDDEN, BATCH, pooling).tolist() == expected
    half = pool(HIDDEN.bfloat16(), BATCH, pooling)
    assert half.dtype == torch.float32 and half.tolist() == expected
    assert pool(HIDDEN.double(), BATCH, pooling).dtype == torch.float64


@pytest.mark.parametrize("pooling", ["last", "first", "mean"])
def test_a_decoder_is_asked_for_what_is_read(pooling: str) -> None:
    """The same as pooling all states, from those of one token of each text but for the mean."""

    def decoder(only: Only | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        assert (only is None) == (pooling == "mean")
        return HIDDEN if only is None else HIDDEN[only.at], [HIDDEN]

    found, routing = run_pooled(decoder, BATCH, pooling)
    assert torch.equal(found, pool(HIDDEN, BATCH, pooling)) and routing[0] is HIDDEN


def test_fewer_dimensions_have_length_one_again() -> None:
    """As if the unscaled vector had been cut and then normalised."""
    vectors = torch.tensor([[3.0, 4.0, 12.0, 0.0], [0.0, 0.0, 0.0, 2.0]])
    unit = torch.nn.functional.normalize(vectors, dim=-1)
    found = truncate(unit, 2)
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    torch.testing.assert_close(truncate(unit, 4), unit)
    assert truncate(unit, None) is unit
    random = torch.randn(7, 16, generator=torch.Generator().manual_seed(0)).double()
    exact = random[:, :5] / random[:, :5].norm(dim=-1, keepdim=True)
    whole = random / random.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(truncate(whole, 5), exact, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(truncate(whole.float(), 5).double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dimensions", [0, -1, 5])
def test_dimensions_that_are_not_there(dimensions: int) -> None:
    with pytest.raises(ValueError, match=f"dimensions must be 1 to 4, got {dimensions}"):
        truncate(torch.ones(2, 4), dimensions)


def test_first_needs_bidirectional_attention() -> None:
    check_pooling("first", causal=False)
    check_pooling("last", causal=True)
    with pytest.raises(ValueError, match="bidirectional attention .*has seen nothing of the text"):
        check_pooling("first", causal=True)
    with pytest.raises(ValueError, match="'max'"):
        check_pooling("max", causal=False)


def test_config_refuses_first_under_a_causal_mask() -> None:
    for changes in ({"embedding_pooling": "first"}, {"reranking_pooling": "first"}):
        with pytest.raises(ValueError, match="bidirectional"):
            replace(ModelConfig(), **changes)
        replace(ModelConfig(causal=False), **changes)


def test_linear_score() -> None:
    head = LinearScore(2)
    with torch.no_grad():
        head.linear.weight.copy_(torch.tensor([[2.0, -1.0]]))
        head.linear.bias.fill_(0.5)
    assert head(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).tolist() == [2.5, -0.5]
    head.reset_parameters(torch.Generator().manual_seed(1))
    assert head.linear.bias.item() == 0
    assert 0 < head.linear.weight.abs().max() <= 2**-0.5


def test_yes_no_score_subtracts_in_fp32() -> None:
    """256 and 1.0078125 are bf16 numbers, their difference is not."""
    head = YesNoScore(torch.tensor([256.0]).bfloat16(), torch.tensor([1.0078125]).bfloat16())
    assert head(torch.tensor([[1.0]])).item() == 254.9921875
    assert not list(head.parameters()) and not head.state_dict()


@pytest.mark.parametrize("tied", [True, False])
def test_yes_no_is_the_log_odds_of_transformers(make_base: Callable[..., Path], tied: bool) -> None:
    folder = make_base(seed=3, tie_word_embeddings=tied)
    model = UniMoER(ModelConfig(base=str(folder), rerank_head="yes_no"))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    yes, no = (model.tokenizer.fast.token_to_id(word) for word in ("yes", "no"))
    expected = []
    with torch.no_grad():
        for query, document in PAIRS:  # the template to its last word, no end token behind it
            text = f"Query: {query}\nDocument: {document}"
            ids = model.tokenizer.fast.encode(text).ids
            logits = theirs(torch.tensor([ids])).logits[0, -1]
            expected.append(logits[[yes, no]].softmax(0)[0])
    found = model.predict(PAIRS)
    assert found.std() > 0.01
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_yes_no_needs_the_words(make_base: Callable[..., Path]) -> None:
    folder = make_base()
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    del raw["model"]["vocab"]["yes"]
    raw["model"]["merges"] = [pair for pair in raw["model"]["merges"] if "".join(pair) != "yes"]
    path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(ValueError, match="single token 'yes'.*rerank_head='linear'"):
        UniMoER(ModelConfig(base=str(folder), rerank_head="yes_no"))
    UniMoER(ModelConfig(base=str(folder)))

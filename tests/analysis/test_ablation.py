"""Keep and omit: components that are taken back, and what planted scores say of them."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import experiments
from analysis import ablation
from eval.collections import load
from eval.protocol import EvaluationSet, without_states
from model.packed import pack
from model.unimoer import UniMoER
from tests.train.tiny import build, tiny_config, write_collection


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_collection(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture
def made(tiny_base: Path, data: Path) -> tuple[UniMoER, EvaluationSet]:
    """Three experts whose B was drawn, uniform weights."""
    row = {**experiments.MOE, "ranks": (4, 3, 2), "router": "uniform"}
    model, texts = build(tiny_config(tiny_base, data, **row))
    with torch.no_grad():
        for name, parameter in model.trained().items():
            if ".lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return model, EvaluationSet(load(str(data)), model.tokenizer, texts.config, without_states)


def hidden(model: UniMoER, evaluation: EvaluationSet, base: bool = False) -> torch.Tensor:
    batch = pack(evaluation.tokenizer.documents(["rare1 bako", "tutu"]), model.device)
    with torch.no_grad():
        return model.hidden(batch, "embedding", base=base)[0].clone()


def test_nothing_kept_is_the_base_and_all_kept_the_model(made) -> None:
    model, evaluation = made
    whole, base = hidden(model, evaluation), hidden(model, evaluation, base=True)
    with ablation.only(model, lambda part: False):
        torch.testing.assert_close(hidden(model, evaluation), base, rtol=1e-4, atol=1e-5)
    with ablation.only(model, lambda part: True):
        assert torch.equal(hidden(model, evaluation), whole)
    assert torch.equal(hidden(model, evaluation), whole)  # put back


def test_a_component_is_taken_out_alone(made) -> None:
    """As if that part's B had been 0: of one projection, of one layer, of one expert."""
    model, _ = made
    whole = {n: p.detach().clone() for n, p in model.trained().items() if ".lora_B" in n}
    for name, has in ablation.components(model).items():
        with ablation.only(model, lambda part, has=has: not has(part)):
            for key, b in model.trained().items():
                if key not in whole:
                    continue
                zero = torch.zeros_like(b, dtype=torch.bool)
                layer, projection = key.split(".")[2], key.rpartition(".")[2]
                if name in (projection, f"layer {layer}"):
                    zero[:] = True
                if projection in ablation.BLOCKS.get(name, ()):
                    zero[:] = True
                if name == "expert reranking":
                    zero[:, 4:7] = True
                if name.startswith("expert") and name != "expert reranking":
                    continue
                assert torch.equal(b, torch.where(zero, 0.0, whole[key])), (name, key)


def test_measure(made, tmp_path: Path) -> None:
    model, evaluation = made
    config = replace(evaluation.config, measured=16)
    found = ablation.measure(model, evaluation, None, config, tmp_path)
    assert found["queries"] == 4 and found["whole"].keys() == {"embedding", "reranking"}
    one = ablation.measure(model, evaluation, None, replace(config, tasks=("reranking",)), tmp_path)
    assert one["whole"].keys() == {"reranking"}  # the trial's tasks, whose the set may not be
    names = set(found["components"])
    assert names == {*experiments.Config().targets, "attention", "MLP", "layer 2", "layer 3",
                     "expert embedding", "expert reranking", "expert shared"}  # fmt: skip
    sample = evaluation.sample(4)
    assert set(sample.documents) >= {d for q in sample.queries for d in sample.qrels[q]}
    assert len(evaluation.queries) == 10  # the whole set is as it was


def test_planted_scores() -> None:
    """The MLP carries everything: nothing is left without it, all is kept by it alone."""

    def trial(gain: float) -> dict:
        whole, base = {"reranking": 0.4 + gain}, {"reranking": 0.4}
        rows = {"MLP": {"omit": base, "keep": whole}, "attention": {"omit": whole, "keep": base},
                "up_proj": {"omit": {"reranking": 0.4 + gain / 2}, "keep": base}}  # fmt: skip
        return {"queries": 9, "whole": whole, "base": base, "components": rows}

    found = ablation.summarise([trial(0.1), trial(0.12)])
    mlp = found["components"]["MLP"]["reranking"]
    assert mlp["lost"]["mean"] == pytest.approx(11) and mlp["kept"]["mean"] == pytest.approx(1)
    assert found["components"]["attention"]["reranking"]["lost"]["mean"] == pytest.approx(0)
    said = ablation.reading({"rank-only": found})
    assert re.search(r"loses 11\.0 \[\S+, \S+\] points without its MLP changes, 0\.0 \[", said)
    none = ablation.summarise([trial(-0.1)])  # below the base: no share of a gain
    assert none["components"]["MLP"]["reranking"]["kept"]["mean"] is None
    assert "| - |" in ablation.markdown({"rank-only": none})

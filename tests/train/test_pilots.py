"""Routing by similarity, from pilots to a saved model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import experiments
from experiments import Config
from model.unimoer import UniMoER
from tests.train.tiny import build, tiny_config
from train.loop import train
from train.pilots import fit_pilots


@pytest.fixture
def config(tiny_base: Path, tiny_data: Path) -> Config:
    pair = {**experiments.PAIR, "ranks": (4, 4), "router": "similarity-max", "pilots": 2}
    return tiny_config(tiny_base, tiny_data, **pair)


def test_pilots_are_centroids_of_what_the_router_sees(config: Config) -> None:
    """One pilot is the mean of the unit vectors of what enters the first routed layer."""
    model, data = build(replace(config, pilots=1))
    fit_pilots(model, data)
    layer = model.decoder.layers[config.adapter_layers]
    for at, texts in enumerate((data.embedding_texts, data.reranking_texts)):
        rows = []
        for i in range(len(texts.ids)):
            batch, _ = texts.batch([i], model.device, model.dtype)
            hidden = model.decoder(batch, last_layer=config.adapter_layers)[0]
            rows.append(layer.input_layernorm(hidden).mean(0))  # pyright: ignore
        unit = torch.nn.functional.normalize(torch.stack(rows), dim=1)
        found = layer.router.pilots[at, 0]  # pyright: ignore
        torch.testing.assert_close(found, unit.mean(0), rtol=1e-4, atol=1e-5)


def test_one_layer_decides_for_all(config: Config) -> None:
    model, data = build(config)
    fit_pilots(model, data)
    assert list(model.routers()) == [config.adapter_layers]
    batch, _ = data.reranking_texts.batch([0, 1, 2], model.device, model.dtype)
    routing = model.score(batch)[1]
    assert len(routing) == 2 and torch.equal(routing[0], routing[1])


@pytest.mark.parametrize("router", ["similarity-max", "random"])
def test_what_a_router_has_untrained_is_saved_and_loaded(
    router: str, config: Config, tmp_path: Path
) -> None:
    if router == "random":
        row = dict(experiments.arms("soft_vs_hard", controls=True)["random"])
        del row["tuned_as"]
        config = replace(config, **{**row, "ranks": (4, 4, 4)})
    model, data = build(config)
    if router != "random":
        fit_pilots(model, data)
    before = {n: p.clone() for n, p in model.kept().items() if ".router." in n}
    train(model, data, config, tmp_path / "seed0")
    assert before and all(torch.equal(p, model.kept()[n]) for n, p in before.items())
    model.save_pretrained(tmp_path / "saved")
    loaded = UniMoER.from_pretrained(tmp_path / "saved")
    pairs = [("rare1 bako", "rare1 misol odd1"), ("rare2", "rare3 tutu")]
    assert torch.equal(model.predict(pairs), loaded.predict(pairs))


def test_without_texts_of_both_tasks_there_are_no_pilots(config: Config) -> None:
    model, data = build(replace(config, tasks=("embedding",)))
    with pytest.raises(ValueError, match="training texts of both tasks"):
        fit_pilots(model, data)

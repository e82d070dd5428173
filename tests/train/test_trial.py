"""What the trials of a process share, how each starts, what it is measured on."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eval.provenance import sources
from model import parallel
from model.unimoer import UniMoER
from tests.train.tiny import tiny_config, write_collection
from train import loop, trial
from train.loop import before
from train.trial import Workbench
from trials import Config

Made = tuple[Workbench, Config]


@pytest.fixture
def made(tiny_base: Path, tmp_path: Path) -> Made:
    """A workbench, and a config whose prefix states it keeps on disk."""
    data = write_collection(tmp_path / "tiny")
    config = tiny_config(tiny_base, data, prefix=True)
    return Workbench(str(data), "cpu", tmp_path / "cache", True), config


def test_no_states_are_kept_beyond_the_limit(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the lower layers are run again each time, and the disk stays as it was."""
    bench, config = made
    model, ids = bench.model(config), [[1, 2, 3], [4]]
    assert bench.states(model, config)(ids, "texts").states is not None
    size = 2 * 4 * model.decoder.config.hidden_size
    assert sum(p.stat().st_size for p in tmp_path.rglob("*.states")) == size
    monkeypatch.setattr(trial, "LIMIT", size - 1)
    found = bench.states(model, config)(ids, "texts")
    assert found.states is None and found.ids == ids


def test_what_is_done_apart_from_the_others_is_not_kept(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 alone looks into models: what only it had would part it from the others later."""
    bench, config = made
    model = bench.model(config)
    monkeypatch.setattr(parallel, "apart", lambda: True)
    alone = bench.evaluation(model, config)
    scores = alone.pair_scores(model)
    assert not bench._sets and bench._evaluation is None
    monkeypatch.setattr(parallel, "apart", lambda: False)
    kept = bench.evaluation(model, config)
    assert kept is bench.evaluation(model, config) is not alone and not kept._sets
    assert kept.pair_scores(model).equal(scores) and bench._sets
    monkeypatch.setattr(parallel, "apart", lambda: True)
    assert bench.evaluation(model, config) is not kept


def test_a_sharded_base_keeps_no_states(made: Made) -> None:
    """The processes would have to compute them together."""
    bench, config = made
    model = bench.model(config)
    assert bench.states(model, replace(config, shard=True))([[1, 2]], "texts").states is None


def test_the_time_of_a_trial_that_was_stopped(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is that of all steps that were kept, and the last of them is kept before the scores."""
    bench, config = made
    place = tmp_path / "runs" / "arm" / "seed0"
    scores = trial._scores

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trial, "_scores", die)
    with pytest.raises(KeyboardInterrupt):
        trial.run_trial(config, "arm", place, bench)
    kept = before(place)
    assert kept.seconds > 0 and place.with_name("seed0.model").is_dir()
    assert kept.peak_bytes > 1e7 and kept.sources == (sources(),)
    monkeypatch.setattr(trial, "_scores", scores)
    monkeypatch.setattr(loop, "run", die)  # no step is taken again
    result = trial.run_trial(config, "arm", place, bench)
    assert result["seconds"]["train"] > kept.seconds and len(result["curve"]) == config.steps
    assert result["peak_bytes"] >= kept.peak_bytes and "begun_by_sources" not in result
    # A checkpoint of other data under the same name is not gone on from.
    bench.collection = replace(bench.collection, fingerprint="other")
    with pytest.raises(ValueError, match=r"another origin .*other.*remove .*seed0\.checkpoint"):
        trial.run_trial(config, "arm", place, bench)


def test_a_model_is_not_kept_beyond_its_trial(tiny_base, tiny_data, tmp_path):
    """The evaluation set is, and with it the base would stay in memory beside the next one."""
    bench = trial.Workbench(str(tiny_data), "cpu", tmp_path, keep_prefix=False)
    config, models, make = tiny_config(tiny_base, tiny_data, prefix=True), [], bench.model

    def model(config: Config) -> UniMoER:
        made = make(config)
        models.append(weakref.ref(made))
        return made

    bench.model = model
    trial.run_baselines(config, bench, lambda *_: None)
    gc.collect()
    assert bench.evaluation(make(config), config)._sets and [ref() for ref in models] == [None]


def test_seed_and_offset_decide_how_a_model_starts(tiny_base, tiny_data, tmp_path):
    bench = trial.Workbench(str(tiny_data), "cpu", tmp_path, keep_prefix=False)
    config = tiny_config(tiny_base, tiny_data)

    def head(**changes: int) -> list[float]:
        trained = bench.model(replace(config, **changes)).trained()
        return trained["head.linear.weight"].flatten().tolist()

    assert head() == head() != head(seed=1)
    assert head(seed_offset=1000) == head(seed=1000) != head()


def test_each_head_is_measured_on_the_tokens_it_is_trained_on(tiny_base, tiny_data, tmp_path):
    """yes_no reads its answer behind the template, with no end token, whatever ran before it."""
    bench = trial.Workbench(str(tiny_data), "cpu", tmp_path, keep_prefix=False)
    for head in ("linear", "yes_no"):
        config = tiny_config(tiny_base, tiny_data, rerank_head=head, reranking_pooling="last")
        model = bench.model(config)
        evaluation = bench.evaluation(model, config)
        texts = evaluation.collection
        pairs = [(texts.queries[q], texts.corpus[d]) for q, d in evaluation.pairs]
        expected = model.score_pairs(pairs).double()
        scores = evaluation.pair_scores(model)
        assert torch.as_tensor(scores).double().allclose(expected, atol=1e-5), head

"""Routing statistics where the answer is known: it reads the task, or it cannot."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import experiments
from analysis import routes, routing
from eval.collections import load
from eval.protocol import EvaluationSet, without_states
from tests.train.tiny import build, tiny_config, write_collection
from trials import Config

EXPERTS = ("embedding", "reranking", "shared")
N, LAYERS = 80, 2
DOMAINS = [f"m{i % 4}" for i in range(N)]


def measure(model, evaluation: EvaluationSet, config: Config, count: int) -> dict | None:
    return routing.measure(model, evaluation, None, replace(config, measured=count), Path())


def weights(**means: tuple[float, float, float]) -> dict[str, np.ndarray]:
    """(N, LAYERS, 3) around the mean of each kind, on the simplex."""
    rng = np.random.default_rng(0)
    return {
        kind: rng.dirichlet(200 * np.array(means.get(kind.replace(" ", "_"), (1 / 3,) * 3)) + 1e-9,
                            (N, LAYERS))
        for kind in routing.TASK_OF_KIND
    }  # fmt: skip


def test_a_router_that_reads_the_task_carries_all_of_it() -> None:
    one = {"embedding": (1.0, 0.0, 0.0), "reranking": (0.0, 1.0, 0.0)}
    found = routing.summarise(
        {kind: np.tile(one[task], (N, LAYERS, 1)) for kind, task in routing.TASK_OF_KIND.items()},
        DOMAINS, EXPERTS,
    )  # fmt: skip
    for row in found["task"]:
        assert row["nats"] == pytest.approx(math.log(2)) and row["p"] < 0.01
    assert found["dead"] == [["shared"]] * LAYERS
    assert found["within"] == [0, 0] and found["between"] == pytest.approx([0.5, 0.5])
    assert found["roles"] == {"embedding": "embedding", "reranking": "reranking"}
    assert found["entropy"]["embedding"] == [0, 0]
    # With one-hot weights the pair without its template is routed like any embedding input.
    assert found["shift"]["template"] == [1, 1] and found["shift"]["content"] == [0, 0]


def test_a_router_that_cannot_read_the_task_carries_nothing() -> None:
    found = routing.summarise(weights(), DOMAINS, EXPERTS)
    for row in found["task"]:
        assert row["nats"] < 1e-3 and row["p"] > 0.01
        assert row["nats"] == pytest.approx(row["by_chance"], abs=1e-3)
    assert found["entropy"]["reranking"] == pytest.approx([math.log(3)] * 2, abs=0.01)


def test_a_router_that_reads_the_template_alone() -> None:
    """Only what stands in the pair's template is weighed otherwise."""
    found = routing.summarise(weights(pair=(0.2, 0.6, 0.2)), DOMAINS, EXPERTS)
    assert found["shift"]["template"] == pytest.approx([0.267] * 2, abs=0.02)
    assert found["shift"]["content"] == pytest.approx([0, 0], abs=0.02)
    assert all(row["p"] < 0.01 for row in found["task"])
    assert found["roles"]["reranking"] == "reranking"


def test_domains_are_told_from_chance() -> None:
    made = weights()
    odd = np.array([d == "m1" for d in DOMAINS])
    made["query"][odd] = np.array([0.8, 0.1, 0.1])
    found = routing.summarise(made, DOMAINS, EXPERTS)["domain"]
    assert all(row["p"] < 0.01 and row["nats"] > 0.05 for row in found["query"])
    assert all(row["p"] > 0.01 for row in found["document"])


def test_weights_by_domain() -> None:
    """Of the largest domains, in what they were planted with, and in the report's table."""
    made, names = weights(), [f"m{min(i // 8, 7)}" for i in range(N)]  # m7 has 24 texts
    made["query"][[name == "m7" for name in names]] = np.array([0.8, 0.1, 0.1])
    found = routing.summarise(made, names, EXPERTS)["domains"]
    assert list(found) == ["m7", "m0", "m1", "m2", "m3", "m4"]
    assert found["m7"]["texts"] == 24 and found["m7"]["query"] == [0.8, 0.1, 0.1]
    assert found["m0"]["query"] == pytest.approx([1 / 3] * 3, abs=0.02)
    trial = {"first_layer": 2, **routing.summarise(made, names, EXPERTS)}
    told = routes.summarise({0: trial, 1: trial})
    assert told["domains"]["m7"]["query"][0]["mean"] == pytest.approx(0.8)
    assert [row["nats"]["mean"] for row in told["layers"]] == [r["nats"] for r in trial["task"]]
    assert routing.by_domain(made, [f"q{i}" for i in range(N)]) == {}
    without = {k: v for k, v in trial.items() if k != "domains"}
    assert routes.summarise({0: trial, 1: without})["domains"] == {}


def test_weights_that_differ_a_little_are_read_off_and_sure() -> None:
    """Half a point apart with a tenth of a point of spread: no bits, but no chance either."""
    apart = {"pair": (0.338, 0.331, 0.331), "query": (0.333,) * 3, "document": (0.333,) * 3}
    trials = {}
    for seed in range(3):
        rng = np.random.default_rng(seed)
        made = {
            kind: np.array(apart.get(kind, (1 / 3,) * 3)) + rng.normal(0, 0.001, (N, 4, 3))
            for kind in routing.TASK_OF_KIND
        }
        trials[seed] = {"first_layer": 2, **routing.summarise(made, DOMAINS, EXPERTS)}
    found = routes.summarise(trials)
    assert found["task"]["nats"]["mean"] < 1e-4 and found["task"]["sure"] == 1
    assert found["decoded"]["mean"] > 0.95
    assert found["domain"]["query"]["sure"] == 0


def test_nothing_is_sure_without_information() -> None:
    trials = {}
    for seed in range(3):
        rng = np.random.default_rng(seed)
        made = {kind: rng.dirichlet((5, 5, 5), (N, 4)) for kind in routing.TASK_OF_KIND}
        trials[seed] = {"first_layer": 2, **routing.summarise(made, DOMAINS, EXPERTS)}
    found = routes.summarise(trials)
    assert found["task"]["sure"] == 0 and abs(found["decoded"]["mean"] - 0.5) < 0.06


def test_p_is_uniform_without_information(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "SHUFFLES", 200)
    rng = np.random.default_rng(0)
    ps = [
        routing.information(rng.dirichlet((5, 5, 5), 40), np.arange(40) % 3, seed=i)["p"]
        for i in range(100)
    ]
    assert sum(p <= 0.05 for p in ps) <= 12 and 0.35 < np.mean(ps) < 0.65


@pytest.mark.parametrize("changes", [{}, {"per_token": True}, {"always_on": "shared"}])
def test_weights_of_a_model_are_those_of_its_texts(
    changes: dict, tiny_base: Path, tmp_path: Path
) -> None:
    data = write_collection(tmp_path / "tiny")
    row = {**experiments.SPARSEGEN, "ranks": (4, 4, 4), **changes}
    config = tiny_config(tiny_base, data, **row)
    model, _ = build(config)
    evaluation = EvaluationSet(load(str(data)), model.tokenizer, config, without_states)
    found = measure(model, evaluation, config, 6)
    assert found is not None and found["texts"] == dict.fromkeys(routing.TASK_OF_KIND, 6)
    assert len(found["means"]["pair"]) == 2 and found["first_layer"] == 2
    ids, _ = routing.inputs(evaluation, 6)
    alone = [routing.weigh(model, [row], "reranking")[0] for row in ids["pair"]]
    together = routing.weigh(model, ids["pair"], "reranking")
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-5)


@pytest.mark.parametrize(("router", "bits"), [("task", 1.0), ("uniform", 0.0)])
def test_a_router_that_reads_the_task_and_one_that_cannot(
    router: str, bits: float, tiny_base: Path, tmp_path: Path
) -> None:
    """Through a model: all of the task's one bit, or nothing of it."""
    data = write_collection(tmp_path / "tiny")
    config = tiny_config(
        tiny_base, data, **{**experiments.SPARSEGEN, "ranks": (4, 4, 4), "router": router}
    )
    model, _ = build(config)
    evaluation = EvaluationSet(load(str(data)), model.tokenizer, config, without_states)
    found = measure(model, evaluation, config, 8)
    assert found is not None and len(found["task"]) == 2
    for row, read in zip(found["task"], found["decoded"], strict=True):
        assert row["nats"] == pytest.approx(bits * math.log(2), abs=1e-6)
        assert read == pytest.approx((1 + bits) / 2)
    assert found["shift"]["task"] == pytest.approx([bits] * 2, abs=1e-6)
    assert found["shift"]["content"] == pytest.approx([0, 0], abs=1e-6)


def test_without_its_template_a_pair_has_the_same_words(tiny_base: Path, tmp_path: Path) -> None:
    """Though its document is cut: under a bare template both are one."""
    data = write_collection(tmp_path / "tiny")
    config = tiny_config(tiny_base, data, document_tokens=2, pair_prompt="{query}\n{document}")
    model, _ = build(config)
    evaluation = EvaluationSet(load(str(data)), model.tokenizer, config, without_states)
    ids, _ = routing.inputs(evaluation, 6)
    assert ids["bare pair"] == ids["pair"] and len({len(row) for row in ids["document"]}) == 1


def test_a_judged_document_that_the_corpus_lacks(tiny_base: Path, tmp_path: Path) -> None:
    data = write_collection(tmp_path / "tiny")
    config = tiny_config(tiny_base, data)
    model, _ = build(config)
    evaluation = EvaluationSet(load(str(data)), model.tokenizer, config, without_states)
    before, domains = routing.inputs(evaluation, 6)
    gone = {"gone": 9}  # judged as the best
    evaluation.qrels = {q: {**judged, **gone} for q, judged in evaluation.qrels.items()}
    assert routing.inputs(evaluation, 6) == (before, domains)
    evaluation.qrels[evaluation.queries[0]] = gone  # nothing else is judged: the query is left out
    every = len(evaluation.queries)
    assert len(routing.inputs(evaluation, every)[1]) == every - 1


def test_a_model_without_a_router_has_no_routing(tiny_base: Path, tmp_path: Path) -> None:
    data = write_collection(tmp_path / "tiny")
    config = tiny_config(tiny_base, data)
    model, _ = build(config)
    evaluation = EvaluationSet(load(str(data)), model.tokenizer, config, without_states)
    assert measure(model, evaluation, config, 4) is None

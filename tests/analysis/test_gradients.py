"""Gradient conflict, planted: the cosine that was put in comes out, in the layers it was put in."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import experiments
from analysis import gradients, roles
from analysis.conflict import between, pick, summarise, write
from analysis.conflict_figures import SPACE_NAMES, draw_heat
from analysis.gradients import HALVES, PAIRS, conflict, pooled, statistics
from analysis.page import over_seeds
from eval import inference
from eval.collections import load
from experiments import MOE
from model.lora import LinearGroup
from tests.analysis.made import Maker
from tests.train.tiny import build, tiny_config, write_collection
from train.loop import train

OUT, D, R = 12, 20, 4


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_collection(tmp_path_factory.mktemp("data") / "tiny")


def normal(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def linear() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A, B, W."""
    return normal(R, D, seed=0), normal(OUT, R, seed=1), normal(OUT, D, seed=2)


def grams(a: torch.Tensor, b: torch.Tensor, w: torch.Tensor, scale: float = 2.0) -> dict:
    """Of the adapter's gradients for two gradients of the weight, G_0 and G_1."""
    g = [normal(OUT, D, seed=s) for s in (7, 8)]
    d_a, d_b = [scale * b.t() @ x for x in g], [scale * x @ a.t() for x in g]
    return conflict(a, b, d_a, d_b, scale, w)


def test_the_induced_gradient_is_the_projection_onto_the_tangent_space() -> None:
    a, b, w = linear()
    p_a = a.t() @ torch.linalg.inv(a @ a.t()) @ a
    p_b = b @ torch.linalg.inv(b.t() @ b) @ b.t()
    g = [normal(OUT, D, seed=s) for s in (7, 8)]
    step = [p_b @ x + x @ p_a - p_b @ x @ p_a for x in g]
    unit = w / w.norm(dim=1, keepdim=True)
    along = [(s * unit).sum(1, keepdim=True) * unit for s in step]
    across = [s - t for s, t in zip(step, along, strict=True)]
    found = grams(a, b, w)
    for space, (x, y) in {"w": step, "along": along, "across": across}.items():
        expected = torch.stack([torch.stack([(p * q).sum() for q in (x, y)]) for p in (x, y)])
        torch.testing.assert_close(found[space], expected, rtol=1e-9, atol=1e-9)


def test_the_induced_gradient_has_no_gauge() -> None:
    """A -> TA, B -> B inv(T) is the same adapter: only (A, B) coordinates tell them apart."""
    a, b, w = linear()
    t = torch.eye(R, dtype=torch.float64) + 0.5 * normal(R, R, seed=9)
    one, other = grams(a, b, w), grams(t @ a, b @ torch.linalg.inv(t), w)
    for space in ("w", "along", "across"):
        torch.testing.assert_close(one[space], other[space], rtol=1e-6, atol=1e-6)
    assert (one["ab"] - other["ab"]).abs().max() > 1


@pytest.mark.parametrize("degrees", [0, 60, 90, 120, 180])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_planted_angle_is_found(degrees: float, noise: float) -> None:
    """Noise of the halves pulls the raw cosine to 0; the corrected one stays at the angle."""
    n, angle = 40_000, math.radians(degrees)
    e = normal(n, seed=0)
    e /= e.norm()
    across = normal(n, seed=1)
    across -= (across @ e) * e
    r = math.cos(angle) * e + math.sin(angle) * across / across.norm()
    halves = [
        v + noise * normal(n, seed=2 + i) / n**0.5 for i, v in enumerate((e, e, 3 * r, 3 * r))
    ]
    found = statistics([(halves[i] @ halves[j]).item() for i, j in PAIRS])
    assert found["corrected"] == pytest.approx(math.cos(angle), abs=0.03)
    # The noise would make the ratio 0.35.
    assert found["ratio"] == pytest.approx(1 / 3, abs=0.005)
    assert found["similarity"] == pytest.approx(0.6, abs=0.01)
    assert found["removed"] == pytest.approx(max(-found["cosine"], 0))  # type: ignore[operator]
    if noise:
        # e: |e|^2 = 1 + noise^2 / 2 after averaging the halves; r: 9 + noise^2 / 2
        shrunk = math.cos(angle) / math.sqrt((1 + noise**2 / 2) * (1 + noise**2 / 18))
        assert found["cosine"] == pytest.approx(shrunk, abs=0.03)
    else:
        assert found["cosine"] == pytest.approx(math.cos(angle), abs=1e-6)


def test_noise_alone_has_no_corrected_cosine() -> None:
    halves = [normal(4000, seed=i) for i in range(4)]
    found = statistics([(halves[i] @ halves[j]).item() for i, j in PAIRS])
    assert found["corrected"] is None and abs(found["cosine"]) < 0.1  # type: ignore[arg-type]


def test_a_gradient_of_zero_has_no_cosine() -> None:
    """B = 0: dA is 0 whatever the task."""
    assert set(statistics([0.0] * 10).values()) == {None}


def planted(angles: dict[int, float]) -> list[dict]:
    """Rows of layers whose gradients stand at the given angles in degrees."""
    rows = []
    for layer, degrees in angles.items():
        at = math.radians(degrees)
        v = {"e": torch.tensor([1.0, 0.0]), "r": torch.tensor([math.cos(at), math.sin(at)])}
        gram = [float(v[HALVES[i][0]] @ v[HALVES[j][0]]) for i, j in PAIRS]
        place = {"layer": layer, "projection": "q_proj", "expert": "all"}
        rows += [{**place, "space": space, "gram": gram} for space in gradients.SPACES]
    return rows


def test_conflict_is_found_in_the_layers_it_was_planted_in() -> None:
    rows = planted({0: 60, 1: 89, 2: 150})
    found = summarise({0: [(1, rows)], 1: [(1, rows)]})
    cosines = [found["layers"][layer]["cosine"]["mean"] for layer in ("0", "1", "2")]
    assert cosines == pytest.approx([0.5, math.cos(math.radians(89)), -(3**0.5) / 2])
    assert found["spaces"]["w"]["conflicts"]["mean"] == pytest.approx(1 / 3)
    assert [found["layers"][layer]["conflicts"]["mean"] for layer in ("0", "1", "2")] == [0, 0, 1]
    assert found["layers"]["2"]["removed"]["mean"] == pytest.approx(-cosines[2])
    assert found["layers"]["2"]["ratio"]["mean"] == pytest.approx(1)
    assert found["cells"]["2"]["q_proj"]["cosine"]["mean"] == pytest.approx(cosines[2])
    assert found["projections"]["q_proj"]["reliability"]["seeds"] == pytest.approx([1, 1])
    late = planted({0: 120, 1: 150, 2: 120})
    found = summarise({0: [(1, rows), (8, late)], 1: [(1, rows), (8, rows)]})
    curve = found["curve"]["w"]
    assert curve["conflicts"] == [[pytest.approx(1 / 3)] * 2, [1, pytest.approx(1 / 3)]]
    # Of three equally long gradients as one: the mean of their cosines
    late_mean = -(0.5 + 3**0.5 / 2 + 0.5) / 3
    assert curve["removed"][0] == pytest.approx([-sum(cosines) / 3] * 2)
    assert curve["removed"][1] == pytest.approx([-late_mean, -sum(cosines) / 3])
    assert curve["similarity"][1] == pytest.approx([1, 1])
    found = summarise({0: [(1, rows)], 1: [(1, rows)]})
    together = statistics(pooled(pick(rows, "w")))["cosine"]
    assert found["spaces"]["w"]["cosine"]["mean"] == pytest.approx(together)


def test_cells_whose_interval_excludes_0_are_marked() -> None:
    """Over three seeds: sure agreement in layer 1 and conflict in layer 2, none in layer 0."""
    trials = {seed: [(1, planted({0: 80 + 10 * seed, 1: 40 + seed, 2: 140 + seed}))]
              for seed in (0, 1, 2)}  # fmt: skip
    [panel, _] = draw_heat({"gradients": {"joint-single": summarise(trials)}}).axes
    assert np.asarray(panel.lines[0].get_xydata()).tolist() == [[0, 1], [0, 2]]
    [panel, _] = draw_heat({"gradients": {"joint-single": summarise({0: trials[0]})}}).axes
    assert len(np.asarray(panel.lines[0].get_xydata())) == 0  # of one seed there is no interval


def test_the_corrected_cosine_stands_beside_the_raw_one_of_the_same_probes() -> None:
    """At the second probe the halves of a task are unrelated: nothing to correct with."""
    clear, noisy = planted({0: 60}), planted({0: 120})
    for row in noisy:
        row["gram"] = [g if i == j or HALVES[i][0] != HALVES[j][0] else 0.0
                       for (i, j), g in zip(PAIRS, row["gram"], strict=True)]  # fmt: skip
    found = summarise({0: [(1, clear), (2, noisy)], 1: [(1, clear), (2, clear)]})["spaces"]["w"]
    assert found["corrected"]["mean"] == found["corrected"]["raw"] == pytest.approx(0.5)
    assert (found["corrected"]["probes"], found["corrected"]["of"]) == (3, 4)
    assert found["cosine"]["mean"] < 0.3


def test_arms_are_compared_at_the_same_seed() -> None:
    """60, 70 and 80 degrees against 90: a seed that one arm lacks is left out."""
    base = summarise({seed: [(1, planted({0: 90}))] for seed in (1, 2, 3)})
    arm = summarise({seed: [(1, planted({0: 50 + 10 * seed}))] for seed in (0, 1, 2, 3)})
    rows = between({"joint-single": base, "joint-moe": arm}, "joint-single")
    assert [row["in"] for row in rows] == list(SPACE_NAMES.values())
    expected = [math.cos(math.radians(x)) for x in (60, 70, 80)]
    for row in rows:
        assert row["arm"] == "joint-moe"
        assert row["difference"]["seeds"] == pytest.approx(expected, abs=1e-6)
    assert between({"joint-moe": arm}, "joint-single") == []


@pytest.mark.parametrize(("spread", "seen"), [(2, True), (60, False)])
def test_the_report_corrects_over_all_it_tests(spread: int, seen: bool, tmp_path: Path) -> None:
    """Two arms of three seeds around 60 and 120 degrees: sure where seeds agree, else not, and
    then it says what could have been seen."""
    maker = Maker(tmp_path / "gradient_conflict" / "smoke")
    maker.baselines()
    for arm, degrees in (("joint-single", 60), ("joint-moe", 120)):
        maker.arm(arm, {"embedding": 0.5, "reranking": 0.4})
        for seed in range(3):
            path = maker.folder / arm / f"seed{seed}.json"
            trial = json.loads(path.read_text())
            trial["curve"][-1]["gradients"] = planted({0: degrees + spread * (seed - 1)})
            path.write_text(json.dumps(trial))
    v = write(maker.folder)
    rows = [row for arm in v["gradients"].values() for row in arm["spaces"].values()]
    tested = [row["cosine"] for row in rows] + [row["difference"] for row in v["between"]]
    assert v["family"] == len(tested) == 12
    assert [row["p_holm"] for row in tested] == inference.holm([row["p"] for row in tested])
    for row in tested:
        se = float(np.std(row["seeds"], ddof=1)) / 3**0.5
        least = inference.smallest_detectable_effect(se, 2, inference.ALPHA / 12)
        assert row["detectable"] == pytest.approx(least)
    text = (maker.folder / "report.md").read_text()
    assert ("gradients agree on the whole" in text) == seen
    assert ("In Joint-MoE (the induced gradient on W) the cosine is -1.0" in text) == seen
    assert ("with these seeds no cosine was detectable" in text) != seen
    assert ("No arm's cosine differs significantly from Joint-Single's (detectable" in text) != seen


@pytest.mark.parametrize(
    "angles",
    [
        {(2, "all"): 60, (3, "all"): 150},
        {(2, "embedding"): 0, (2, "reranking"): 120, (2, "shared"): 90},
    ],
)
def test_an_angle_planted_in_a_model_is_found_there(
    angles: dict, tiny_base: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a model's own adapters: by layer, projection and expert, from gradients of A and B
    that stand for two gradients of each weight at a known angle. Elsewhere they are the same."""
    row = {**experiments.ARMS["joint-moe"], "ranks": (4, 3, 2)}
    model, data = build(tiny_config(tiny_base, tiny_data, **row))
    lora = model.config.lora
    assert lora is not None
    made: dict[str, dict[str, torch.Tensor]] = {"embedding": {}, "reranking": {}}
    for number, (prefix, group) in enumerate(model.named_modules()):
        if not isinstance(group, LinearGroup):
            continue
        for name in group.adapted_names:
            a, b = group.lora_A[name].detach(), group.lora_B[name].detach()
            b.normal_(generator=torch.Generator().manual_seed(number))
            grads = {task: (torch.zeros(a.shape).double(), torch.zeros(b.shape).double())
                     for task in made}  # fmt: skip
            for (expert, at), alpha, rank in zip(
                lora.slices().items(), lora.alphas, lora.ranks, strict=True
            ):
                layer, scale = int(prefix.split(".")[2]), alpha / rank
                degrees = angles.get((layer, expert), angles.get((layer, "all"), 0))
                one, two = tangent(a[at].double(), b[:, at].double(), seed=number)
                turn = math.radians(degrees)
                of = {"embedding": one, "reranking": math.cos(turn) * one + math.sin(turn) * two}
                for task, g in of.items():
                    grads[task][0][at] = scale * b[:, at].double().t() @ g
                    grads[task][1][:, at] = scale * g @ a[at].double().t()
            for task, (d_a, d_b) in grads.items():
                made[task] |= {f"{prefix}.lora_A.{name}": d_a, f"{prefix}.lora_B.{name}": d_b}
    monkeypatch.setattr(gradients, "task_gradient", lambda model, data, task, batches: made[task])
    found = summarise({0: [(1, gradients.measure(model, data, 1))]})
    if (3, "all") in angles:
        for layer, cosine in (("2", 0.5), ("3", -(3**0.5) / 2)):
            for cell in found["cells"][layer].values():
                assert cell["cosine"]["mean"] == pytest.approx(cosine, abs=1e-4)
            assert found["layers"][layer]["cosine"]["mean"] == pytest.approx(cosine, abs=1e-4)
    else:
        # Half of an expert's linears, those of layer 3, are at an angle of 0.
        for name, cosine in {"embedding": 1, "reranking": 0.25, "shared": 0.5}.items():
            row = found["experts"][name]
            # Either half of the probes is the same here, and both tasks' gradients are as long.
            assert row["cosine"]["mean"] == pytest.approx(cosine, abs=1e-4)
            assert row["corrected"]["mean"] == pytest.approx(cosine, abs=1e-4)
            assert row["reliability"]["mean"] == pytest.approx(1, abs=1e-4)
            assert row["ratio"]["mean"] == pytest.approx(1, abs=1e-4)
            if name != "shared":  # whose right angles fall to either side
                assert row["conflicts"]["mean"] == (0.5 if name == "reranking" else 0)
        assert found["layers"]["3"]["cosine"]["mean"] == pytest.approx(1, abs=1e-4)


def test_experts_of_a_learned_router_are_told_by_their_roles(tmp_path: Path) -> None:
    """Two seeds that dealt the roles the other way round: by role the cosines are alike."""
    maker = Maker(tmp_path / "gradient_conflict" / "smoke")
    maker.baselines()
    maker.arm("joint-moe", {"embedding": 0.5, "reranking": 0.4}, seeds=2)
    for seed, (first, second) in enumerate([(60, 120), (120, 60)]):
        path = maker.folder / "joint-moe" / f"seed{seed}.json"
        trial = json.loads(path.read_text())
        trial["config"] |= {"experts": ["a", "b"], "ranks": [16, 16]}
        weights = [[0.8, 0.2], [0.2, 0.8]]
        line = trial["curve"][-1]
        line["weights_embedding"], line["weights_reranking"] = weights[seed], weights[1 - seed]
        line["gradients"] = [
            {**row, "expert": name}
            for name, degrees in (("all", 90), ("a", first), ("b", second))
            for row in planted({0: degrees})
        ]
        path.write_text(json.dumps(trial))
    experts = write(maker.folder)["gradients"]["joint-moe"]["experts"]
    for task, cosine in (("embedding", 0.5), ("reranking", -0.5)):
        assert experts[roles.OWN[task]]["cosine"]["seeds"] == pytest.approx([cosine] * 2, abs=1e-6)


def test_halves_of_the_probes_share_no_query(tiny_base: Path, tiny_data: Path, monkeypatch) -> None:
    config = replace(tiny_config(tiny_base, tiny_data), **MOE)
    model, data = build(config, load(str(tiny_data)))
    asked = []

    def gradient(model, data, task, batches):
        asked.append(list(batches))
        named = {n: torch.ones_like(p) for n, p in model.trained().items() if ".lora_" in n}
        return named

    monkeypatch.setattr(gradients, "task_gradient", gradient)
    watched = replace(config, probes=1000)
    look, line = gradients.watch(model, data, watched), {}
    assert look is not None
    look(config.steps - 1, line)
    half = min(data.per_epoch(task) for task in ("embedding", "reranking")) // 2
    assert half and asked == [list(range(half)), list(range(half, 2 * half))] * 2
    assert line["gradients_batches"] == half
    monkeypatch.setattr(data, "per_epoch", lambda task: 1)
    with pytest.raises(ValueError, match="an epoch has one batch: raise steps"):
        gradients.watch(model, data, watched)


def tangent(a: torch.Tensor, b: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """Two orthonormal changes that the adapter B A can make to first order: U A + B V."""
    found: list[torch.Tensor] = []
    for k in (0, 1):
        g = normal(len(b), len(a), seed=2 * seed + k) @ a + b @ normal(*a.shape, seed=seed + k + 50)
        for other in found:
            g = g - (g * other).sum() * other
        found.append(g / g.norm())
    return found


def test_over_seeds_is_students_interval() -> None:
    """1, 2, 3: mean 2, s / sqrt n = 1 / sqrt 3, t(2) = 4.3027."""
    found = over_seeds([1.0, None, 2.0, 3.0])
    assert found["mean"] == 2 and found["interval"] == pytest.approx([-0.4841, 4.4841], abs=1e-4)
    assert over_seeds([1.0])["interval"] is None and over_seeds([None])["mean"] is None


@pytest.mark.parametrize("arm", ["joint-single", "joint-moe"])
def test_watching_changes_nothing_and_survives_in_the_log(
    arm: str, tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    row = {**experiments.ARMS[arm], "ranks": (4,) if arm == "joint-single" else (4, 3, 2)}
    config = tiny_config(tiny_base, tiny_data, **row, lora_dropout=0.1, steps=4, probes=1)
    logs = []
    for probes in (0, 1):
        made = replace(config, probes=probes)
        model, data = build(made)
        watched = gradients.watch(model, data, made)
        logs.append(train(model, data, made, tmp_path / f"{probes}", callback=watched))
    plain = [{k: v for k, v in line.items() if not k.startswith("gradients")} for line in logs[1]]
    assert plain == logs[0]
    rows = logs[1][-1]["gradients"]
    experts = {row["expert"] for row in rows}
    assert experts == ({"all"} if arm == "joint-single" else {"all", *config.experts})
    cells = {(row["layer"], row["projection"]) for row in rows}
    assert len(cells) == 2 * 7 and {layer for layer, _ in cells} == {2, 3}
    # The first seed's gradients of the whole model, straight from autograd
    model.eval()
    name = "decoder.layers.3.self_attn.o.lora_B.o_proj"
    e = gradients.task_gradient(model, data, "embedding", [0])[name]
    loss = gradients.task_loss("embedding", model, data, 0, gradients.PROBE_SEED)
    (expected,) = torch.autograd.grad(loss, [model.trained()[name]])
    torch.testing.assert_close(e, expected)


def test_memory_does_not_grow_with_the_probes(tiny_base: Path, tiny_data: Path) -> None:
    """What autograd keeps for four probe batches is what it keeps for the largest of them."""
    model, data = build(tiny_config(tiny_base, tiny_data, **experiments.ARMS["joint-single"]))
    model.eval()

    def peak(batches: list[int]) -> int:
        now = most = 0

        class Kept:
            def __init__(self, tensor: torch.Tensor):
                nonlocal now, most
                self.tensor = tensor
                now += tensor.nbytes
                most = max(most, now)

            def __del__(self) -> None:
                nonlocal now
                now -= self.tensor.nbytes

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            gradients.task_gradient(model, data, "embedding", batches)
        return most

    alone = [peak([step]) for step in range(4)]
    assert 0 < max(alone) == peak([0, 1, 2, 3])

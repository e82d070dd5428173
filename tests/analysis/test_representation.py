"""CKA, spectra and STIR at values that are known."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import experiments
from analysis import gradients, representation, representations, spectra, subspaces
from analysis.cka import CKA, cka, hsic
from analysis.page import over_seeds
from analysis.representation_claims import claims
from analysis.subspace import between, factor, rank_for, stir
from eval import stats
from eval.collections import load
from eval.protocol import EvaluationSet, without_states
from model.packed import pack
from tests.train.tiny import build, tiny_config, write_collection
from train.loop import train


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def rotation(n: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(normal(n, n, seed=seed))[0]


# CKA -------------------------------------------------------------------------------------------


def test_cka_of_rotated_features_is_one() -> None:
    x = normal(200, 12)
    assert cka(x, 3 * x @ rotation(12) + 5, batch=64) == pytest.approx(1)


def test_cka_of_unrelated_features_is_zero_even_where_they_are_wide() -> None:
    """The biased estimate is far from 0 here: 50 inputs of 400 features."""
    values = [cka(normal(50, 400, seed=i), normal(50, 400, seed=100 + i)) for i in range(20)]
    assert sum(values) / 20 == pytest.approx(0, abs=0.02)  # type: ignore[arg-type]
    k, l = (t @ t.t() for t in (normal(50, 400), normal(50, 400, seed=1)))  # noqa: E741
    centre = torch.eye(50, dtype=torch.float64) - 1 / 50
    k, l = centre @ k @ centre, centre @ l @ centre  # noqa: E741
    assert (k * l).sum() / (k.norm() * l.norm()) > 0.8


def test_hsic_is_unbiased() -> None:
    """Its mean over samples of 5 is the population's squared covariance, here 1 for y = x."""
    found = [
        hsic(*(t @ t.t() for t in (x, x))) for x in (normal(5, 1, seed=s) for s in range(4000))
    ]
    assert torch.stack(found).mean().item() == pytest.approx(1, abs=0.15)


def test_minibatches_are_averaged_before_the_ratio() -> None:
    x, y = normal(128, 6), normal(128, 6) + normal(128, 6, seed=1)
    made = CKA()
    for a, b in zip(x.split(32), y.split(32), strict=True):
        made.add(a, b)
    parts = [[hsic(p @ p.t(), q @ q.t()) for p, q in zip(u.split(32), v.split(32), strict=True)]
             for u, v in ((x, y), (x, x), (y, y))]  # fmt: skip
    cross, first, second = (torch.stack(p).sum() for p in parts)
    assert made.value == pytest.approx((cross / (first * second).sqrt()).item())
    assert cka(x[:100], y[:100], batch=33) == cka(x[:99], y[:99], batch=33)  # a rest of one


def test_cka_of_what_does_not_vary() -> None:
    assert cka(torch.ones(10, 3), normal(10, 3)) is None
    with pytest.raises(ValueError, match="at least 4"):
        CKA().add(normal(3, 2), normal(3, 2))
    with pytest.raises(ValueError, match="must be the same"):
        CKA().add(normal(5, 2), normal(6, 2))


# Spectra ---------------------------------------------------------------------------------------


def test_singular_values_are_those_of_the_product() -> None:
    a, b = normal(4, 30), normal(20, 4, seed=1)
    expected = torch.linalg.svdvals(b @ a)[:4]
    torch.testing.assert_close(spectra.singular_values(a, b), expected)
    assert spectra.singular_values(a, torch.zeros(20, 4)).tolist() == [0] * 4


@pytest.mark.parametrize(
    ("values", "effective", "stable"),
    [([1, 1, 1, 1], 4, 4), ([1, 0, 0, 0], 1, 1), ([2, 1, 1, 0], 2 * math.sqrt(2), 1.5),
     ([0, 0, 0, 0], 0, 0)],
)  # fmt: skip
def test_ranks(values: list[float], effective: float, stable: float) -> None:
    made = torch.tensor(values, dtype=torch.float64)
    assert spectra.effective_rank(made) == pytest.approx(effective)
    assert spectra.stable_rank(made) == pytest.approx(stable)


def test_principal_angles_are_those_that_were_planted() -> None:
    """Three directions: shared, turned by 60 degrees, orthogonal."""
    q = rotation(10)
    x = q[:, :3]
    turned = q[:, 1] * math.cos(math.pi / 3) + q[:, 4] * math.sin(math.pi / 3)
    y = torch.stack((q[:, 0], turned, q[:, 5]), 1) @ normal(3, 3)
    assert spectra.principal_cosines(x, y).tolist() == pytest.approx([1, 0.5, 0], abs=1e-9)
    found = spectra.overlap(x, y)
    assert found["overlap"] == pytest.approx(1.25 / 3) and found["by_chance"] == 0.3


def test_random_spaces_overlap_by_chance() -> None:
    found = [spectra.overlap(normal(40, 4, seed=i), normal(40, 6, seed=99 + i)) for i in range(200)]
    assert sum(row["overlap"] for row in found) / 200 == pytest.approx(6 / 40, abs=0.01)
    assert found[0]["by_chance"] == 6 / 40


def test_experts_are_compared_in_pairs() -> None:
    a, b = normal(3, 12), normal(8, 3, seed=1)
    found = spectra.experts({"one": (a, b, 2.0), "twin": (a, 3 * b, 2.0), "other":
                             (normal(3, 12, seed=2), torch.zeros(8, 3), 2.0)})  # fmt: skip
    twin = found["pairs"][0]
    assert twin["experts"] == ["one", "twin"] and twin["cosine"] == pytest.approx(1)
    assert twin["inputs"]["overlap"] == pytest.approx(1) == twin["outputs"]["overlap"]
    assert found["alone"]["twin"]["norm"] == pytest.approx(3 * found["alone"]["one"]["norm"])
    assert found["alone"]["one"]["norm"] == pytest.approx((2 * b @ a).norm().item())
    assert found["pairs"][1]["cosine"] is None and found["alone"]["other"]["norm"] == 0


# STIR ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [0, 3, 6])
def test_stir_has_its_closed_values(shared: int) -> None:
    """k = 6 of d = 30 directions with equal energy, of which the tasks share some."""
    k, d, n = 6, 30, 20_000
    q = rotation(d)
    e = normal(n, k, seed=1) @ q[:, :k].t()
    r = normal(n, k, seed=2) @ q[:, k - shared : 2 * k - shared].t()
    found = stir((e,), (r,), k=k)
    expected = (shared / k - k / d) / (1 - k / d)
    assert found["stir"] == pytest.approx(expected, abs=0.03)
    assert found["within"] == pytest.approx(1, abs=0.01)
    assert found["null"] == pytest.approx(k / d, abs=0.02)


def test_stir_takes_the_rank_that_holds_the_energy() -> None:
    values = torch.tensor([5.0, 4.1, 0.5, 0.4], dtype=torch.float64)
    c = torch.diag(values.sqrt()) @ rotation(4).t()
    assert (rank_for(c), rank_for(c, 0.95), rank_for(c, most=1)) == (2, 3, 1)
    x = normal(400, 4) @ torch.diag(values.sqrt())
    found = stir((x,), (x,))
    assert found["k"] in (2, 3) and found["stir"] == pytest.approx(1, abs=0.05)
    with pytest.raises(ValueError, match="8 inputs"):
        stir((normal(4, 3),), (normal(40, 3),))


def test_a_factor_s_gram_matrix_is_the_covariance(monkeypatch: pytest.MonkeyPatch) -> None:
    """In batches, far from the origin, of a difference and of chosen rows."""
    monkeypatch.setattr("analysis.subspace.BATCH", 7)
    x, y, rows = normal(50, 4) + 1e4, normal(50, 4, seed=1), torch.arange(0, 50, 2)
    made = factor((x, y), rows)
    torch.testing.assert_close(made.t() @ made, torch.cov((x - y)[rows].t()), rtol=1e-9, atol=1e-9)


def test_null_is_what_random_spaces_hold() -> None:
    x, d, k = normal(40, 12) * torch.arange(1, 13), 12, 3
    null = between((x, x), (x, x), k)["null"]
    spaces = [torch.linalg.qr(normal(d, k, seed=s))[0] for s in range(3000)]
    own = torch.linalg.svd(x).Vh[:k].t()
    held = [(x @ u).square().sum() / (x @ own).square().sum() for u in spaces]
    assert null == pytest.approx(torch.stack(held).mean().item(), rel=0.02)


def test_a_task_that_shares_nothing_with_itself_has_no_stir() -> None:
    halves = [normal(3, 60, seed=s) for s in range(4)]
    found = between((halves[0], halves[1]), (halves[2], halves[3]), 3)
    assert found["stir"] is None and abs(found["within"] - found["null"]) < 0.05


@pytest.mark.parametrize("shared", [0, 2, 4])
def test_stir_of_planted_changes(shared: int) -> None:
    """Two experts of rank 4 that write to `shared` common directions of 24; they read noise."""
    k, d = 4, 24
    q = rotation(d)
    e, r = q[:, :k], q[:, k - shared : 2 * k - shared]
    mix = [rotation(k, seed=s) for s in range(4)]  # equal energies, another basis in each half
    reads = [normal(k, 200, seed=10 + s) for s in range(4)]
    made = [subspaces.sides((torch.linalg.qr(a.t())[0].t(), b @ m, 2.0))
            for a, b, m in zip(reads, (e, e, r, r), mix, strict=True)]  # fmt: skip
    first, second, third, fourth = (one["outputs"] for one in made)
    found = between((first, second), (third, fourth), k)
    assert found["stir"] == pytest.approx((shared / k - k / d) / (1 - k / d))
    first, second, third, fourth = (one["inputs"] for one in made)
    assert between((first, second), (third, fourth), k)["stir"] is None


def test_sides_have_the_moments_of_the_change() -> None:
    a, b = normal(3, 12), normal(8, 3, seed=1)
    w = 2.0 * b @ a
    found = subspaces.sides((a, b, 2.0))
    torch.testing.assert_close(found["inputs"].t() @ found["inputs"], w.t() @ w)
    torch.testing.assert_close(found["outputs"].t() @ found["outputs"], w @ w.t())


# The measure -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_collection(tmp_path_factory.mktemp("data") / "tiny")


def trained(arm: str, base: Path, data: Path, place: Path, **changes):
    """A model after a few large steps, and what it is measured on."""
    row = {**experiments.ARMS[arm], "ranks": (4, 3, 2) if arm == "joint-moe" else (4,)}
    config = tiny_config(base, data, **{**row, "steps": 3, "learning_rate": 5e-2, **changes})
    model, texts = build(config)
    train(model, texts, config, place)
    model.save_pretrained(place.with_name(f"{place.name}.model"))
    return model, EvaluationSet(load(str(data)), model.tokenizer, config, without_states), texts


def test_features_are_the_means_of_what_the_next_block_reads(
    tiny_base: Path, data: Path, tmp_path: Path
):
    model, evaluation, _ = trained("joint-moe", tiny_base, data, tmp_path / "joint-moe" / "seed0")
    ids = evaluation.tokenizer.pairs([("rare1", "rare1 bako odd1"), ("rare2 mi", "tutu")])
    path = tmp_path / "features.npy"
    found = representation.features(model, ids, "reranking", path).clone()
    for i, row in enumerate(ids):
        batch = pack([row], model.device)
        tasks = torch.ones(1, dtype=torch.int64)
        for layer in (2, 3):
            hidden = model.decoder(batch, tasks, last_layer=layer + 1)[0]
            read = hidden / hidden.square().mean(1, keepdim=True).sqrt()
            torch.testing.assert_close(found[layer - 2, i], read.mean(0), rtol=1e-4, atol=1e-4)
    base = representation.features(model, ids, "reranking", path, base=True).clone()
    none = representation.features(model, ids, "reranking", path, fixed=[0.0, 0.0, 0.0])
    torch.testing.assert_close(base, none, rtol=1e-4, atol=1e-5)
    assert (base - found).abs().max() > 1e-3


@pytest.mark.parametrize(("factor", "direction"), [(2.0, 1.0), (-2.0, -1.0), (0.0, None)])
def test_the_sign_of_what_the_tasks_have_in_common(factor: float, direction: float | None) -> None:
    """Training moved documents by d, and pairs by a multiple of it, against their own bases."""
    d = normal(8, seed=5)
    documents, pairs = normal(1, 40, 8, seed=1), normal(1, 30, 8, seed=2)
    views = {"document": {"base": documents, "model": documents + d},
             "pair": {"base": pairs, "model": pairs + factor * d}}  # fmt: skip
    [row] = representation.overlaps(views)
    assert row["direction"] == (None if direction is None else pytest.approx(direction))


def test_gradients_are_compared_by_what_is_read_and_what_is_written(
    tiny_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of dA and columns of dB, in halves of the same probe batches."""
    model, _, texts = trained("joint-single", tiny_base, data, tmp_path / "joint-single" / "seed0")
    given = []
    monkeypatch.setattr(subspaces, "between", lambda e, r, most: given.append((e, r, most)) or {})
    rows = subspaces.of_gradients(model, texts)
    at = [i for i, row in enumerate(rows) if (row["layer"], row["projection"]) == (3, "o_proj")]
    assert [rows[i]["side"] for i in at] == ["inputs", "outputs"]
    for task, side in (("embedding", 0), ("reranking", 1)):
        for half in (0, 1):
            batches = range(half * subspaces.BATCHES, (half + 1) * subspaces.BATCHES)
            g = gradients.task_gradient(model, texts, task, batches)
            name = "decoder.layers.3.self_attn.o.lora_{}.o_proj"
            torch.testing.assert_close(given[at[0]][side][half], g[name.format("A")])
            torch.testing.assert_close(given[at[1]][side][half], g[name.format("B")].t())
    assert given[at[0]][2] == 4  # directions at most: the rank


def test_crosstalk_is_the_energy_of_the_written_out_change(
    tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    model, evaluation, _ = trained("joint-moe", tiny_base, data, tmp_path / "joint-moe" / "seed0")
    batch = pack(evaluation.tokenizer.documents(["rare1 bako", "tutu"]), model.device)
    with representation.crosstalk(model) as found:
        hidden = model.decoder(batch, last_layer=3)[0]
    row = found[2, "q_proj"]
    layer: Any = model.decoder.layers[2]
    x = layer.input_layernorm(model.decoder(batch, last_layer=2)[0])
    group = layer.self_attn.qkv
    part = slice(4, 7)  # the second expert
    change = 2.0 * group.lora_B["q_proj"][:, part] @ group.lora_A["q_proj"][part]
    assert row["reranking"] == pytest.approx((x @ change.t()).square().sum().item(), rel=1e-4)
    assert row["tokens"] == len(hidden) and (3, "q_proj") not in found


def test_measure_of_two_arms(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    places = {arm: tmp_path / arm / "seed0" for arm in ("joint-single", "joint-moe")}
    found = {}
    for arm, place in places.items():
        model, evaluation, texts = trained(arm, tiny_base, data, place)
        config = replace(texts.config, measured=10)
        found[arm] = representation.measure(model, evaluation, lambda t=texts: t, config, place)
        assert not list(place.parent.glob(".*"))  # nothing is left over
    single, moe = found["joint-single"], found["joint-moe"]
    assert single["cka_arms"] == {"document": {}, "pair": {}}
    assert list(moe["cka_arms"]["pair"]) == ["joint-single"]
    assert len(moe["cka_arms"]["pair"]["joint-single"]) == 2
    assert len(single["linears"]) == 14 and single["linears"][0]["pairs"] == []
    assert [len(row["pairs"]) for row in moe["linears"]] == [3] * 14
    assert len(moe["stir"]) == 2 and set(moe["maps"]) == {"t-SNE", "UMAP"}
    for maps in moe["maps"].values():
        assert set(maps) == {"model", "uniform", "base"} and len(maps["base"]["pair"]) == 10
    assert len(moe["gradients"]) == 28 and moe["deltas"] == []
    assert {"model | base", "embedding | shared"} <= moe["cka"]["pair"].keys()
    json.dumps(moe, allow_nan=False)


def test_what_is_claimed_is_tested_over_seeds() -> None:
    """1, 2, 3 and 4, 5, 6 percent nearer to Emb-Only; of the overlaps one is what chance has."""
    cka: Any = {"emb-only": {"by_seed": [0.91, 0.92, 0.93]}, "rank-only": {"by_seed": [0.9] * 3}}
    far = {"emb-only": {"by_seed": [0.94, 0.95, 0.96]}, "rank-only": {"by_seed": [0.9] * 3}}
    pair = {"outputs_overlap": over_seeds([0.25, 0.26, 0.27]),
            "outputs_by_chance": over_seeds([0.26, 0.26, 0.26])}  # fmt: skip
    measured: Any = {
        "emb-only": {"arms": {kind: {} for kind in representations.KIND_NAMES}, "pairs": {}},
        "joint-moe": {
            "at": [0, 1, 2],
            "arms": {"document": cka, "pair": far},
            "pairs": {"a | b": pair},
        },
    }
    rows = claims(measured)
    assert [row["arm"] for row in rows] == ["joint-moe"] * 3
    means = [row["difference"]["mean"] for row in rows]
    assert means == pytest.approx([0.02, 0.05, 0.0])
    ps = [row["difference"]["p"] for row in rows]
    assert [row["difference"]["p_holm"] for row in rows] == stats.holm(ps)
    assert rows[2]["what"] == "overlap of a with b (write) less by chance"
    # A seed that one of them lacks is left out, and pairs stay those of one seed.
    cka["emb-only"]["by_seed"], cka["rank-only"]["by_seed"] = [None, 0.92, 0.93], [0.1, 0.9, 0.9]
    assert claims(measured)[0]["difference"]["seeds"] == pytest.approx([0.02, 0.03])


def test_routing_is_held_against_uniform_weights_and_sharing_against_the_specialists() -> None:
    """By seed: 0.10 and 0.12 below Uniform-MoE's, whose first seed the other lacks; 0.2 below and
    0.1 above the specialists' STIR."""
    none: Any = {kind: {} for kind in representations.KIND_NAMES}

    def arm(seeds: list[int], overlap: list[float] | None, stir: list[float | None]) -> Any:
        row = {} if overlap is None else {"a | b": {
            "outputs_overlap": over_seeds(overlap),
            "outputs_by_chance": over_seeds([0.0] * len(overlap)),
        }}  # fmt: skip
        return {"at": seeds, "arms": none, "pairs": row, "stir": [{"stir": {"by_seed": stir}}]}

    rows = claims({
        "emb-only": arm([1, 2], None, [0.7, 0.9]), "rank-only": arm([1, 2], None, [0.4, 0.6]),
        "joint-single": arm([1, 2], None, [0.5, 0.7]),
        "joint-moe": arm([1, 2], [0.25, 0.26], [0.0, 0.0]),
        "uniform-moe": arm([0, 1, 2], [0.9, 0.35, 0.38], [None, 0.0, 0.0]),
    })  # fmt: skip
    found = {(row["arm"], row["what"]): row["difference"]["seeds"] for row in rows}
    stir = "STIR of documents with pairs less"
    assert found["joint-single", f"{stir} Emb-Only's"] == pytest.approx([-0.2, -0.2])
    assert found["joint-single", f"{stir} Rank-Only's"] == pytest.approx([0.1, 0.1])
    overlap = "overlap of a with b (write) less"
    assert found["joint-moe", f"{overlap} Uniform-MoE's"] == pytest.approx([-0.1, -0.12])
    assert ("uniform-moe", f"{overlap} Uniform-MoE's") not in found
    assert len(found) == 5


@pytest.mark.parametrize("method", representation.MAP_METHODS)
def test_a_map_keeps_clusters_apart_and_torch_s_threads(method: str) -> None:
    """Two far groups stay two; the number of threads decides torch's rounding."""
    x = np.concatenate([normal(30, 8).numpy(), 50 + normal(30, 8, seed=1).numpy()])
    before = torch.get_num_threads()
    made = representation.MAP_METHODS[method](x.astype(np.float32))
    assert torch.get_num_threads() == before and made.shape == (60, 2)
    first, second = made[:30], made[30:]
    gap = np.linalg.norm(first.mean(0) - second.mean(0))
    assert gap > max(np.linalg.norm(p - p.mean(0), axis=1).mean() for p in (first, second))


def test_changes_of_two_seeds(tiny_base: Path, data: Path, tmp_path: Path) -> None:
    """The specialists in the row of Rank-Only, and experts that a hard switch gives each task: a
    learned router deals their roles anew with each seed, so names tell nothing."""
    for arm in ("emb-only", "rank-only", "joint-moe", "task"):
        for seed in (0, 1):
            switch = {"experts": experiments.PAIR["experts"], "ranks": (3, 2), "router": "task"}
            row, changes = (arm, {}) if arm != "task" else ("joint-single", switch)
            trained(row, tiny_base, data, tmp_path / arm / f"seed{seed}", seed=seed, **changes)
            assert (subspaces.of_changes(tmp_path / arm / f"seed{seed}") == []) == (
                seed == 0 or arm in ("emb-only", "joint-moe")
            )
    rows = subspaces.of_changes(tmp_path / "rank-only" / "seed1")
    assert len(rows) == 28 and {row["side"] for row in rows} == {"inputs", "outputs"}
    found = subspaces.summarise([{"deltas": rows}], "deltas")
    assert found["outputs"]["linears"] == 14 and 0 <= found["outputs"]["null"]["mean"] < 1


def test_features_of_many_texts_do_not_fill_memory(
    tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    """They lie in the file, not in a copy of it: what is written to one is read from the other."""
    model, evaluation, _ = trained("joint-single", tiny_base, data, tmp_path / "x" / "seed0")
    ids = evaluation.tokenizer.documents([f"rare{i}" for i in range(30)])
    path = tmp_path / "features.npy"
    made = representation.features(model, ids, "embedding", path)
    again = np.load(path, mmap_mode="r")
    assert isinstance(again, np.memmap) and again.shape == tuple(made.shape)
    made[1, 7, 3] = 123.0
    assert again[1, 7, 3] == 123.0

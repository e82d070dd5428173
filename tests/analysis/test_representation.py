"""What is measured of trained models: features, gradients, changes; and what is claimed of them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import experiments
from analysis import gradients, representation, representations, roles, subspaces
from analysis.page import over_seeds
from analysis.representation_claims import claims
from analysis.representation_figures import draw_spectra
from eval import inference
from eval.collections import load
from eval.protocol import EvaluationSet, without_states
from model.packed import pack
from tests.analysis.drawn import normal
from tests.train.tiny import build, tiny_config, write_collection
from train.loop import train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_collection(tmp_path_factory.mktemp("data") / "tiny")


def trained(arm: str, base: Path, data: Path, place: Path, **changes):
    """A model after a few large steps, and what it is measured on."""
    row = {**experiments.ARMS[arm], "ranks": (4, 3, 2) if arm == "joint-moe" else (4,)}
    config = tiny_config(base, data, **{**row, "steps": 3, "learning_rate": 5e-2, **changes})
    model, texts = build(config)
    curve = train(model, texts, config, place)
    trial = {"config": config.to_json(), "curve": curve}
    place.with_name(f"{place.name}.json").write_text(json.dumps(trial))
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
    count = gradients.halves(texts, ("embedding", "reranking"), subspaces.BATCHES)
    for task, side in (("embedding", 0), ("reranking", 1)):
        for half in (0, 1):
            batches = range(half * count, (half + 1) * count)
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
    assert [row["difference"]["p_holm"] for row in rows] == inference.holm(ps)
    assert rows[2]["what"] == "overlap of a with b (write) less by chance"
    # A seed that one of them lacks is left out, and pairs stay those of one seed.
    cka["emb-only"]["by_seed"], cka["rank-only"]["by_seed"] = [None, 0.92, 0.93], [0.1, 0.9, 0.9]
    assert claims(measured)[0]["difference"]["seeds"] == pytest.approx([0.02, 0.03])


def test_routing_is_held_against_uniform_weights_and_sharing_against_the_specialists() -> None:
    """By seed: 0.10 and 0.12 below Uniform-MoE's, whose first seed the other lacks; 0.2 below and
    0.1 above the specialists' STIR."""
    none: Any = {kind: {} for kind in representations.KIND_NAMES}

    def arm(
        seeds: list[int], overlap: list[float] | None, stir: list[float | None], pair: str = ""
    ) -> Any:
        row = {} if overlap is None else {pair: {
            "outputs_overlap": over_seeds(overlap),
            "outputs_by_chance": over_seeds([0.0] * len(overlap)),
        }}  # fmt: skip
        return {"at": seeds, "arms": none, "pairs": row, "stir": [{"stir": {"by_seed": stir}}]}

    rows = claims({
        "emb-only": arm([1, 2], None, [0.7, 0.9]), "rank-only": arm([1, 2], None, [0.4, 0.6]),
        "joint-single": arm([1, 2], None, [0.5, 0.7]),
        "joint-moe": arm([1, 2], [0.25, 0.26], [0.0, 0.0], "own | other"),
        "uniform-moe": arm([0, 1, 2], [0.9, 0.35, 0.38], [None, 0.0, 0.0], "a | b"),
    })  # fmt: skip
    found = {(row["arm"], row["what"]): row["difference"]["seeds"] for row in rows}
    stir = "STIR of documents with pairs less"
    assert found["joint-single", f"{stir} Emb-Only's"] == pytest.approx([-0.2, -0.2])
    assert found["joint-single", f"{stir} Rank-Only's"] == pytest.approx([0.1, 0.1])
    overlap = "overlap of own with other (write) less"
    assert found["joint-moe", f"{overlap} Uniform-MoE's"] == pytest.approx([-0.1, -0.12])
    assert ("uniform-moe", "overlap of a with b (write) less Uniform-MoE's") not in found
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


def test_experts_of_a_learned_router_are_averaged_by_role() -> None:
    """Two seeds that dealt the roles otherwise: what belongs to one role has one value."""
    names, dealt = ("a", "b", "c"), {0: (0, 1, 2), 1: (2, 0, 1)}  # of each expert, its role
    told = [*roles.OWN.values(), "the other"]
    alike = {frozenset((0, 1)): 0.25, frozenset((0, 2)): 0.5, frozenset((1, 2)): 0.75}
    measured = {}
    for seed, role in dealt.items():
        weights = {task: [0.8 if r == at else 0.1 for r in role]
                   for at, task in enumerate(roles.OWN)}  # fmt: skip
        trial = {"config": {"experts": names, "router": "sparsegen"},
                 "curve": [{f"weights_{task}": row for task, row in weights.items()}]}  # fmt: skip
        alone = {
            name: dict.fromkeys(("norm", "effective_rank", "stable_rank"), float(r))
            for name, r in zip(names, role, strict=True)
        }
        cka: Any = {f"{x} | {y}": [0.9] for x in ("model", "base") for y in (*names, "uniform")}
        cka = {"model | base": [0.9], **cka}
        pairs = []
        for i, j in ((0, 1), (0, 2), (1, 2)):
            value = alike[frozenset((role[i], role[j]))]
            cka[f"{names[i]} | {names[j]}"] = [value]
            side = {"overlap": value, "by_chance": 0.0}
            pairs.append({"experts": [names[i], names[j]], "inputs": side, "outputs": side,
                          "cosine": value})  # fmt: skip
        energy = {name: {"pair": 1.0 + r, "document": 1.0}
                  for name, r in zip(names, role, strict=True)}  # fmt: skip
        one = {
            "first_layer": 0, "texts": {}, "stir": [], "gradients": [], "deltas": [],
            "experts": list(names), "linears": [{"alone": alone, "pairs": pairs}],
            "cka": dict.fromkeys(representations.KIND_NAMES, cka),
            "cka_arms": {kind: {} for kind in representations.KIND_NAMES},
            "crosstalk": [{"energy": energy}],
        }  # fmt: skip
        measured[seed] = representations.by_role(one, trial)
    found = representations.summarise(measured)
    pairs = [(told[i], told[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    names_of_pairs = [" | ".join(pair) for pair in pairs]
    assert list(found["spectra"]) == told and list(found["pairs"]) == names_of_pairs
    for at, name in enumerate(told):
        assert found["spectra"][name]["norm"]["seeds"] == [at, at]
        assert found["crosstalk"][name]["seeds"] == pytest.approx([1 + at, 1 + at])
    for name, value in zip(names_of_pairs, (0.25, 0.5, 0.75), strict=True):
        assert found["pairs"][name]["outputs_overlap"]["seeds"] == [value, value]
        assert found["experts"]["pair"][name] == [[value, value]]
        assert found["views"]["document"][name]["seeds"] == [value, value]


def test_spectra_have_the_spread_over_seeds() -> None:
    """Over linears, of which one did not change, -1.5 and -2.5: -2, t(1) = 12.706 times 0.5."""

    def linears(second: float) -> list[dict[str, Any]]:
        values = ([4.0, 4 * second], [1.0, 0.01], [0.0, 0.0])
        return [{"alone": {"shared": {"values": row}}} for row in values]

    trials = {seed: {"experts": ["shared"], "linears": linears(second)}
              for seed, second in ((0, 0.1), (1, 0.001))}  # fmt: skip
    [panel] = draw_spectra({"emb-only": trials}).axes
    mean, *ends = (np.asarray(line.get_ydata()).tolist() for line in panel.lines)
    assert mean == pytest.approx([0, -2])
    assert [end[1] for end in ends] == pytest.approx([-2 - 6.353, -2 + 6.353], abs=1e-3)


def test_changes_of_two_seeds(
    tiny_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The specialists in the row of Rank-Only, and each task's own expert: by name under a hard
    switch; under a learned router by role, which it deals anew with each seed."""
    dealt = {0: ("reranking", "shared"), 1: ("shared", "embedding")}
    monkeypatch.setattr(roles, "of_trial", lambda trial: dict(
        zip(dealt[trial["config"]["seed"]], roles.OWN.values(), strict=True)
    ))  # fmt: skip
    for arm in ("emb-only", "rank-only", "joint-moe", "task"):
        for seed in (0, 1):
            switch = {"experts": experiments.PAIR["experts"], "ranks": (3, 2), "router": "task"}
            row, changes = (arm, {}) if arm != "task" else ("joint-single", switch)
            trained(row, tiny_base, data, tmp_path / arm / f"seed{seed}", seed=seed, **changes)
            assert (subspaces.of_changes(tmp_path / arm / f"seed{seed}") == []) == (
                seed == 0 or arm == "emb-only"
            )
    [own] = {str(row["experts"]) for row in subspaces.of_changes(tmp_path / "joint-moe" / "seed1")}
    assert own == str({"embedding": ["shared", "reranking"], "reranking": ["embedding", "shared"]})
    [own] = {str(row["experts"]) for row in subspaces.of_changes(tmp_path / "task" / "seed1")}
    assert own == str({task: [task, task] for task in roles.OWN})
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

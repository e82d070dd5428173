"""Where a trial starts: parts of other arms, their merges, parts that are held."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft.utils.merge_utils import ties as peft_ties

from eval.collections import Collection
from experiments import ON_BASE, ON_EMBEDDER, Config
from model.lora import LinearGroup
from model.saved import read_config
from model.unimoer import UniMoER
from tests.train.tiny import build
from train import start
from train.loop import train
from train.start import Held, begin

PAIR = {"experts": ("embedding", "reranking"), "ranks": (4, 4), "router": "uniform"}


@pytest.fixture(scope="module")
def arms(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A setting's folder with two specialists, whose parameters were drawn."""
    folder = tmp_path_factory.mktemp("setting")
    for seed, arm in enumerate(("emb-only", "rank-only")):
        model, _ = build(replace(tiny, seed=seed))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.trained().values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
        model.save_pretrained(folder / arm / "seed0.model")
    return folder


def at(folder: Path) -> Path:
    return folder / "mine" / "seed0"


def change(model: UniMoER, part: str) -> dict[str, torch.Tensor]:
    """s B A of one expert in float64, by linear."""
    lora = model.config.lora
    assert lora is not None
    index, found = lora.experts.index(part), {}
    rows, scale = lora.slices()[part], lora.alphas[index] / lora.ranks[index]
    for prefix, group in model.named_modules():
        if isinstance(group, LinearGroup):
            for name in group.adapted_names:
                a, b = group.lora_A[name].detach()[rows], group.lora_B[name].detach()[:, rows]
                found[f"{prefix}.{name}"] = scale * b.double() @ a.double()
    return found


def loaded(arms: Path, arm: str) -> UniMoER:
    return UniMoER.from_pretrained(arms / arm / "seed0.model")


def test_an_expert_and_the_head_begin_as_another_arm_left_them(tiny: Config, arms: Path) -> None:
    config = replace(tiny, **PAIR, start=("embedding=emb-only", "head=rank-only"))
    model, _ = build(config)
    fresh = change(model, "reranking")
    assert begin(model, config, at(arms)) == {"embedding": 1.0}
    theirs = change(loaded(arms, "emb-only"), "shared")
    for name, mine in change(model, "embedding").items():
        torch.testing.assert_close(mine, theirs[name])
        assert torch.equal(change(model, "reranking")[name], fresh[name])
    head = loaded(arms, "rank-only").head.state_dict()
    for name, value in model.head.state_dict().items():
        assert torch.equal(value, head[name])


@pytest.mark.parametrize("alpha", [2.0, 8.0])
def test_a_linear_merge_is_the_weighted_sum_of_the_changes(
    alpha: float, tiny: Config, arms: Path
) -> None:
    config = replace(tiny, ranks=(8,), alpha_over_rank=alpha, merge_weight=0.3,
                     start=("shared=emb-only+rank-only",))  # fmt: skip
    model, _ = build(config)
    begin(model, config, at(arms))
    one, two = (change(loaded(arms, arm), "shared") for arm in ("emb-only", "rank-only"))
    for name, mine in change(model, "shared").items():
        torch.testing.assert_close(mine, 0.3 * (one[name] + two[name]), rtol=1e-5, atol=1e-6)


def test_ties_is_peft_s() -> None:
    generator = torch.Generator().manual_seed(0)
    changes = [torch.randn(20, 30, generator=generator, dtype=torch.float64) for _ in range(3)]
    for density in (0.1, 0.5, 0.999):
        theirs = peft_ties(changes, torch.ones(3), density)
        torch.testing.assert_close(start.ties(changes, density), theirs)


def test_a_ties_merge_keeps_what_its_rank_can_hold(tiny: Config, arms: Path) -> None:
    """At full rank the merged change is exact, below it its best approximation."""
    parts = ("shared=emb-only+rank-only",)
    one, two = (change(loaded(arms, arm), "shared") for arm in ("emb-only", "rank-only"))
    merged = {name: 0.5 * start.ties([one[name], two[name]], 0.3) for name in one}
    for rank in (2, 16):
        config = replace(tiny, ranks=(rank,), merge="ties", merge_weight=0.5, merge_density=0.3,
                         start=parts)  # fmt: skip
        model, _ = build(config)
        kept = begin(model, config, at(arms))["shared"]
        left = sum((merged[n] - mine).square().sum() for n, mine in change(model, "shared").items())
        whole = sum(value.square().sum() for value in merged.values())
        assert kept == pytest.approx(1 - float(left / whole), abs=1e-5)
        best = [torch.linalg.svdvals(value).square() for value in merged.values()]
        assert kept == pytest.approx(float(sum(s[:rank].sum() for s in best) / whole), abs=1e-5)


def test_what_is_held_stays_and_the_rest_learns(
    tiny: Config, arms: Path, collection: Collection, tmp_path: Path
) -> None:
    """Bit for bit, with weight decay on; the numbers held are counted."""
    config = replace(tiny, **PAIR, tasks=("reranking",), frozen=("embedding",), weight_decay=0.1,
                     start=("embedding=emb-only",))  # fmt: skip
    model, data = build(config, collection)
    begin(model, config, at(arms))
    held, free = change(model, "embedding"), change(model, "reranking")
    train(model, data, config, tmp_path / "seed0")
    for name, value in change(model, "embedding").items():
        assert torch.equal(value, held[name])
        assert not torch.equal(change(model, "reranking")[name], free[name])
    adapters = sum(p.numel() for n, p in model.trained().items() if ".lora_" in n)
    assert Held(model, config.frozen).count == adapters // 2
    head = sum(p.numel() for p in model.head.parameters())
    assert Held(model, ("head", "embedding", "reranking")).count == adapters + head


def test_a_held_expert_changes_nothing_for_the_others(
    tiny: Config, collection: Collection, tmp_path: Path
) -> None:
    """Beside an untrained expert that is held, an expert learns as it does alone."""
    alone = replace(tiny, ranks=(4,), alpha_over_rank=2.0, tasks=("reranking",), weight_decay=0.1)
    beside = replace(alone, **PAIR, alpha_over_rank=4.0, frozen=("embedding",))
    first, data = build(alone, collection)
    second, _ = build(beside, collection)
    copied = {n: p.detach().clone() for n, p in first.trained().items() if ".lora_A" in n}
    with torch.no_grad():
        for name, parameter in second.trained().items():
            if name in copied:
                parameter[4:] = copied[name]
        for name, parameter in second.head.named_parameters():
            parameter.copy_(dict(first.head.named_parameters())[name])
    logs = [train(model, data, config, tmp_path / f"{i}" / "seed0")
            for i, (model, config) in enumerate(((first, alone), (second, beside)))]  # fmt: skip
    for a, b in zip(*logs, strict=True):
        assert a["loss_reranking"] == pytest.approx(b["loss_reranking"], rel=1e-4)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": ("shared=nobody",)}, "no trained model .*nobody/seed0.model"),
        ({"start": ("shared=emb-only",), "ranks": (2,)}, "shared has rank 2, but emb-only make 4"),
        ({"start": ("shared=emb-only+rank-only",)}, "rank 4, but emb-only . rank-only make 8"),
        ({"start": ("head=emb-only+rank-only",)}, "a head is taken from one arm"),
        (
            {"start": ("shared=emb-only",), "adapter_layers": 3},
            r"adapt .*layers\.2\..* too, which this arm does not: give it their adapter_layers",
        ),
        ({"start": ("shared=emb-only",), "targets": ("q_proj",)}, "adapt .* too, which this arm"),
        ({"start": ("shared=emb-only",), "adapter_layers": 1}, "do not all adapt"),
    ],
)
def test_what_cannot_be_started_from(changes: dict, message: str, tiny: Config, arms: Path) -> None:
    config = replace(tiny, **changes)
    model, _ = build(config)
    with pytest.raises(ValueError, match=message):
        begin(model, config, at(arms))


def test_another_base_is_refused(tiny: Config, arms: Path) -> None:
    config = replace(tiny, start=("shared=emb-only",))
    model, _ = build(config)
    model.identity["fingerprint"] = "another"
    with pytest.raises(ValueError, match="was trained on a base with fingerprint"):
        begin(model, config, at(arms))


def test_models_carry_what_was_merged(tiny: Config, arms: Path, tmp_path: Path) -> None:
    config = replace(tiny, ranks=(8,), start=("shared=emb-only+rank-only",))
    model, _ = build(config)
    begin(model, config, at(arms))
    model.save_pretrained(tmp_path / "merged")
    again = UniMoER.from_pretrained(tmp_path / "merged")
    lora = read_config(tmp_path / "merged")[0].lora
    assert lora is not None and lora.ranks == (8,)
    for name, value in change(again, "shared").items():
        assert torch.equal(value, change(model, "shared")[name])


@pytest.mark.parametrize("on", ["base", "embedder"])
def test_a_reranking_lora_leaves_the_embedder_as_it_was(
    on: str, tiny: Config, arms: Path, collection: Collection, tmp_path: Path
) -> None:
    """One model: its vectors are the frozen embedder's, its scores those of what it has learnt."""
    row = {**ON_BASE, "ranks": (1, 4)} if on == "base" else {**ON_EMBEDDER, "ranks": (1, 4, 4)}
    config = replace(tiny, **row, steps=3)
    model, data = build(config, collection)
    embedder = build(tiny)[0] if on == "base" else loaded(arms, "emb-only")
    begin(model, config, at(arms))
    texts = list(collection.corpus.values())
    pairs = [(text, texts[0]) for text in texts]
    scores = model.score_pairs(pairs)
    train(model, data, config, tmp_path / "seed0")
    torch.testing.assert_close(
        model.encode_document(texts), embedder.encode_document(texts), rtol=0, atol=1e-6
    )
    assert (model.score_pairs(pairs) - scores).abs().max() > 1e-3

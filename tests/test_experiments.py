"""experiments.py: every row makes a Config that a model can be built from; controls are matched."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

import experiments
import scales
from analysis import reports
from eval import baselines
from experiments import EXPERIMENTS, Config
from model.processor import resolve_dtype
from model.router import ROUTES, Router
from scales import SCALES
from train.trial import model_config

ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    (name, arm, scale)
    for name in EXPERIMENTS
    for scale in SCALES
    for arm in experiments.arms(name, controls=True, aa=True, scale=scale)
]
# What an arm may differ in; everything else is the same for all, so that they can be compared.
ARM_FIELDS = {"tasks", "experts", "ranks", "router", "router_noise", "expert_dropout"}


@pytest.mark.parametrize(("experiment", "arm", "scale"), ROWS)
def test_every_row_builds(experiment, arm, scale):
    base = "smollm2-135m" if arm.endswith("-w64") else "b"
    config = experiments.config(experiment, arm, scale, 2, data="d", base=base)
    assert (config.seed, config.data, config.base) == (2, "d", base)
    assert config.steps >= (0 if config.start else 1) and len(config.experts) == len(config.ranks)
    assert config.layers is None or config.adapter_layers < config.layers
    model = model_config(replace(config, dtype=resolve_dtype(config.dtype, "cpu")))
    assert (model.router is None) == (config.router == "")
    if model.router is not None:
        assert model.router.kind in ROUTES
        Router(8, config.experts, model.router)  # refuses experts that it cannot route


@pytest.mark.parametrize(("experiment", "arm", "scale"), ROWS)
def test_json_there_and_back(experiment, arm, scale):
    config = experiments.config(experiment, arm, scale, 1)
    raw = json.loads(json.dumps(config.to_json()))
    assert Config.from_json(raw) == config
    assert raw.keys() == {f.name for f in fields(Config)}
    hash(Config.from_json(raw))  # lists have become tuples again


def test_the_arms_and_their_order():
    four = ["emb-only", "rank-only", "joint-single", "joint-moe"]
    controls, aa = list(EXPERIMENTS["kill_gate"].controls), list(EXPERIMENTS["kill_gate"].aa)
    assert list(experiments.arms("kill_gate")) == four
    assert list(experiments.arms("kill_gate", controls=True)) == four + controls
    assert list(experiments.arms("kill_gate", aa=True)) == four + aa
    assert list(experiments.arms("kill_gate", True, True)) == four + controls + aa
    assert len({*four, *controls, *aa}) == len(four + controls + aa)


@pytest.mark.parametrize("scale", SCALES)
def test_the_four_arms_differ_only_in_what_makes_them_arms(scale):
    """Data, steps, rates and measurement are one setting: arms are comparable by construction."""
    made = [experiments.config("kill_gate", arm, scale, 0) for arm in experiments.arms("kill_gate")]
    differ = {
        f.name for f in fields(Config) if len({getattr(config, f.name) for config in made}) > 1
    }
    assert differ - {"learning_rate", "clip"} == ARM_FIELDS  # those two the sweep settles per arm


def test_the_aa_arms_are_their_twins_with_other_seeds():
    for arm, twin in (("emb-only-aa", "emb-only"), ("rank-only-aa", "rank-only")):
        made, other = (experiments.config("kill_gate", name, "small", 1) for name in (arm, twin))
        assert made == replace(other, seed_offset=1000)


def test_the_sweep_decides_for_an_arm_and_its_controls(monkeypatch):
    monkeypatch.setitem(scales.TUNED, "full", {"joint-moe": {"learning_rate": 0.25}})

    def rate(arm: str, **overrides: Any) -> float:
        return experiments.config("kill_gate", arm, "full", 0, **overrides).learning_rate

    assert rate("joint-moe") == rate("uniform-moe") == rate("oracle-moe") == 0.25
    untouched = scales.SCALES["full"]["learning_rate"]
    assert rate("joint-single") == rate("joint-3r") == rate("emb-only-aa") == untouched
    assert rate("joint-moe", learning_rate=0.5) == 0.5
    assert rate("joint-moe", data="scifact") == untouched  # the sweep was of another setting
    monkeypatch.setitem(scales.TUNED, "full-scifact", {"joint-moe": {"learning_rate": 0.125}})
    assert rate("joint-moe", data="scifact") == 0.125
    every = {
        name: row for e in EXPERIMENTS.values() for name, row in {**e.controls, **e.aa}.items()
    }
    assert all(row["tuned_as"] in EXPERIMENTS["kill_gate"].arms for row in every.values())
    changed = [
        row.get("tuned_as", arm) in experiments.ARMS
        for e in EXPERIMENTS.values()
        if e.report != "sweep"
        for arm, row in e.arms.items()
    ]
    assert all(changed), "every arm takes the rates that a sweep has settled"


def test_the_sweep_tries_every_arm_on_dev():
    tried = {}
    for name in experiments.arms("sweep"):
        config = experiments.config("sweep", name, "small", 0)
        arm = name.split("-lr")[0]
        tried.setdefault(arm, set()).add((config.learning_rate, config.clip))
        twin = experiments.config("kill_gate", arm, "small", 0)
        same = replace(twin, split="dev", learning_rate=config.learning_rate, clip=config.clip)
        assert config == same
    assert tried == dict.fromkeys(EXPERIMENTS["kill_gate"].arms, set(scales.SWEPT))


def test_the_baselines_do_not_depend_on_what_arms_decide():
    made = experiments.plain("kill_gate", "small")
    other = experiments.plain("kill_gate", "small", steps=3, learning_rate=0.5, clip=2.0)
    assert made == other != experiments.plain("kill_gate", "small", document_tokens=3)


def test_the_controls_are_matched():
    def made(arm: str) -> Config:
        return experiments.config("kill_gate", arm, "small", 0)

    moe, joint = made("joint-moe"), made("joint-single")
    assert made("joint-2r") == replace(joint, ranks=(2 * joint.ranks[0],))
    assert made("joint-3r") == replace(joint, ranks=(sum(moe.ranks),))
    assert sum(moe.ranks) == 3 * joint.ranks[0]
    for arm, router in (("uniform-moe", "uniform"), ("oracle-moe", "task")):
        plain = replace(moe, router=router, router_noise=0.0, expert_dropout=0.0)
        assert made(arm) == plain
    # As many updates with half the operations, or as many operations with half the tasks; over the
    # training queries of the unscaled arm.
    same = {"data_steps": joint.steps}
    assert made("joint-half") == replace(joint, steps=joint.steps // 2, **same)
    for arm in ("emb-only", "rank-only"):
        assert made(f"{arm}-double") == replace(made(arm), steps=2 * joint.steps, **same)


def test_no_other_arm_trains_on_what_another_number_of_steps_takes():
    scaled = {arm for experiment, arm, scale in ROWS
              if experiments.config(experiment, arm, scale, 0).data_steps}  # fmt: skip
    assert scaled == {"joint-half", "emb-only-double", "rank-only-double"}


@pytest.fixture
def fifth() -> tuple[str, dict]:
    """The arm that README adds, its name and row."""
    page = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    recipe = re.search(
        r"A new arm: one row in `experiments.py`, such as `(.+?)` under `contr", page
    )
    assert recipe
    [arm] = eval(f"{{{recipe[1]}}}", dict(vars(experiments))).items()
    return arm


@pytest.mark.parametrize("kind", ["controls", "arms"])
def test_a_fifth_arm_takes_one_row(fifth, kind, monkeypatch, tmp_path):
    """Where README puts it, what is published stays as it is; not so among the planned arms."""
    name, row = fifth
    monkeypatch.setitem(getattr(EXPERIMENTS["kill_gate"], kind), name, row)
    test_every_row_builds("kill_gate", name, "small")
    published = ROOT / "results" / "kill_gate" / "small"
    copy = Path(shutil.copytree(published, tmp_path / "kill_gate" / "small"))
    reports.write("kill_gate", copy)
    same = (copy / "report.md").read_text() == (published / "report.md").read_text()
    arms = json.loads((copy / "verdict.json").read_text())["arms"]
    assert (same, name in arms) == ((True, False) if kind == "controls" else (False, True))


def test_what_is_asked_for_wins():
    made = experiments.config("kill_gate", "joint-moe", "small", 0, router_noise=0.7, layers=3)
    assert (made.router_noise, made.layers, made.router) == (0.7, 3, "sparsegen")


def test_steps_factor_applies_to_the_steps_that_count():
    assert experiments.config("kill_gate", "joint-half", "small", 0, steps=30).steps == 15
    double = experiments.config("kill_gate", "emb-only-double", "small", 0, steps=30)
    assert (double.steps, double.data_steps) == (60, 30)
    assert experiments.config("kill_gate", "emb-only", "small", 0, steps=30).steps == 30
    row = EXPERIMENTS["kill_gate"].controls["joint-half"]
    assert row == {"steps_factor": 0.5, "tuned_as": "joint-single"}  # not consumed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ()}, "tasks must be some of embedding, reranking"),
        ({"tasks": ("retrieval",)}, "got \\('retrieval',\\)"),
        ({"reranking_loss": "hinge"}, "listwise or bce, got 'hinge'"),
        ({"group_size": 1}, "a positive and a negative, got 1"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"embedding_batch": 0}, "embedding_batch must be"),
        ({"data_steps": -1}, "data_steps must be at least 0, got -1"),
        ({"reranking_batch": -1}, "reranking_batch must be"),
        ({"candidates": 0}, "candidates must be"),
        ({"start": ("shared=a",), "steps": -1}, "steps must be at least 0, got -1"),
        ({"scored": ("both",)}, "scored must be some of"),
        ({"matryoshka": (8, 8)}, r"ascending widths of at least 1, got \[8, 8\]"),
        ({"matryoshka": (16, 8)}, r"ascending widths of at least 1, got \[16, 8\]"),
        ({"matryoshka": (0, 8)}, r"ascending widths of at least 1, got \[0, 8\]"),
        ({"matryoshka": ("8",)}, r"ascending widths of at least 1, got \['8'\]"),
        ({"merge": "sum"}, "merge is linear or ties, got 'sum'"),
        ({"start": ("embedding=a",)}, "parts of .*shared.*head.*got 'embedding'"),
        ({"start": ("shared",)}, r"PART=ARM or PART=ARM\+ARM, got \['shared'\]"),
        ({"frozen": ("router",)}, "parts of .*got 'router'"),
        ({"frozen": ("shared", "head")}, "nothing is left to train"),
    ],
)
def test_a_config_that_cannot_work(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)


def test_it_needs_the_standard_library_alone():
    code = "import experiments; print(len(experiments.EXPERIMENTS))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.stderr) == (str(len(EXPERIMENTS)), "")


@pytest.mark.parametrize("scale", SCALES)
def test_the_ladder_has_all_three_arms_at_each_size(scale):
    arms = experiments.arms("scale_study", scale=scale)
    sizes = {}
    for arm in arms:
        made = experiments.config("scale_study", arm, scale, 0)
        sizes.setdefault((made.layers, made.adapter_layers), []).append(arm)
        size = experiments.size_of("scale_study", arm, scale)
        plain = experiments.plain("scale_study", scale, **size)
        assert (plain.layers, plain.adapter_layers) == (made.layers, made.adapter_layers)
    assert all(len(members) == 3 for members in sizes.values())
    assert len({experiments.baselines_name(experiments.size_of("scale_study", arm, scale))
                for arm in arms}) == len(sizes)  # fmt: skip
    if scale == "small":
        assert [layers for layers, _ in sizes] == [8, 12, 16, 24, 30]
        assert all(layers - first == 4 for layers, first in sizes)


def test_soft_and_hard_have_as_many_ranks():
    """What the arms differ in is how the same capacity is weighed."""
    arms = experiments.arms("soft_vs_hard", controls=True)
    ranks = {
        arm: sum(experiments.config("soft_vs_hard", arm, "small", 0).ranks)
        for arm, row in arms.items()
        if row.get("router")
    }
    assert len(ranks) >= 14 and set(ranks.values()) == {48}


def test_what_is_the_same_trial_in_two_experiments_has_the_same_config():
    def made(experiment: str, arm: str) -> Config:
        return experiments.config(experiment, arm, "small", 1)

    for arm in experiments.SIZED:
        assert made("kill_gate", arm) == made("soft_vs_hard", arm) == made("remedies", arm)
        assert made("kill_gate", arm) == made("scale_study", f"{arm}-16l")
    assert made("kill_gate", "joint-moe") == made("soft_vs_hard", "sparsegen")
    assert made("kill_gate", "joint-moe") == made("rank_sweep", "all-r16")


def test_a_rank_that_grows_with_the_width(tmp_path):
    def rank(base):
        return experiments.config("scale_study", "emb-only-w64", "full", 0, base=base).ranks

    assert rank("smollm2-135m") == (9,) and rank("Qwen/Qwen3-1.7B-Base") == (32,)
    (tmp_path / "config.json").write_text('{"hidden_size": 640}')
    assert rank(str(tmp_path)) == (10,)
    with pytest.raises(ValueError, match="the width of somebody/else is not known"):
        rank("somebody/else")


def test_trained_baselines_are_those_of_the_routers_and_a_lora_on_a_frozen_embedder():
    def made(experiment: str, arm: str) -> Config:
        return experiments.config(experiment, arm, "small", 1)

    for arm in experiments.arms("trained_baselines"):
        if arm != "embedder-lora":
            assert made("trained_baselines", arm) == made("soft_vs_hard", arm)
    on_embedder, on_base = (made("trained_baselines", a) for a in ("embedder-lora", "base-lora"))
    for config in (on_embedder, on_base):
        # Retrieval is what is frozen; one expert of the specialists' rank and rate learns.
        assert config.tasks == ("reranking",) and config.scored == ("embedding", "reranking")
        assert set(config.experts) - set(config.frozen) == {"reranking"}
        assert config.ranks[config.experts.index("reranking")] == 16
        twin = made("kill_gate", "rank-only")
        assert (config.learning_rate, config.clip) == (twin.learning_rate, twin.clip)
    assert on_embedder.starts() == {"shared": ("emb-only",)}
    assert on_base.starts() == {} and on_base.router == on_embedder.router == "task"
    asked = baselines.embedder("b")
    assert on_base.query_prompt == asked.prompts.filled("query")
    assert (on_base.embedding_pooling, on_base.document_prompt) == (
        asked.embedding_pooling, asked.prompts.filled("document")
    )  # fmt: skip

"""The study as data: what is run, with which settings. Standard library only.

A new experiment is a row in EXPERIMENTS, a new arm a row in its `controls` (in its `arms` before
anything is published, as reports name those that are missing); scales are rows of SCALES. A trial
is one (experiment, arm, seed); its `Config` says everything about it.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from scales import LADDER, PILOT, SCALES, SWEPT, TUNED
from trials import Config, Experiment, setting_name, width

THREE = ("embedding", "reranking", "shared")
MOE = {"experts": THREE, "ranks": (16, 16, 16)}
PAIR = {"experts": ("embedding", "reranking"), "ranks": (24, 24)}  # without shared, as many ranks
BARE = {"query_prompt": "{query}", "pair_prompt": "{query}\n{document}"}  # no templates
BESIDE = {  # two experts that are always on, at the specialists' rank and scale: .5 * 4 = 2
    "experts": PAIR["experts"], "ranks": (16, 16), "router": "uniform", "alpha_over_rank": 4.0,
}  # fmt: skip
HEAD = {  # experts stay as they are, the reranking head learns, both tasks are measured
    "tasks": ("reranking",), "frozen": ("shared",), "scored": ("embedding", "reranking"),
    "head_learning_rate": 1e-2,
}  # fmt: skip
# The specialists' experts in one, nothing trained.
MERGED = {"start": ("shared=emb-only+rank-only", "head=rank-only"), "steps_factor": 0.0}
ON_BASE = {  # the base embeds as it is, one expert learns to rerank; the other stays 0
    "experts": PAIR["experts"], "ranks": (1, 16), "router": "task", "frozen": ("embedding",),
    "tasks": ("reranking",), "scored": ("embedding", "reranking"),
}  # fmt: skip
ON_EMBEDDER = {  # the same on the base with emb-only's expert, which is always on
    **ON_BASE, "experts": THREE, "ranks": (1, 16, 16), "always_on": "shared",
    "frozen": ("embedding", "shared"), "start": ("shared=emb-only",),
}  # fmt: skip
AS_QWEN3 = {  # as Qwen3-Embedding is asked
    "query_prompt": "Instruct: Given a web search query, retrieve relevant passages that answer "
    "the query\nQuery:{query}", "embedding_pooling": "last",
}  # fmt: skip
LIST = {"rerank_head": "interaction"}
MODES = {"pointwise": {}, "listwise": LIST, "e2rank": {"rerank_head": "pseudo_query"}}
SPARSEGEN = {**MOE, "router": "sparsegen", "router_noise": 0.1, "expert_dropout": 0.1}

ARMS = {
    "emb-only": {"tasks": ("embedding",)},
    "rank-only": {"tasks": ("reranking",)},
    "joint-single": {},
    "joint-moe": SPARSEGEN,
}

# Fields of a scale that an arm may change, by its row of TUNED or its `steps_factor`.
TUNED_FIELDS = ("steps", "learning_rate", "clip")

SPECIALISTS = ("emb-only", "rank-only")
SIZED = (*SPECIALISTS, "joint-single")


def _ladder(sizes) -> dict[str, dict]:
    """The specialists and the joint arm at each size: `emb-only-8l`; `emb-only` with all layers."""
    return {
        arm if layers is None else f"{arm}-{layers}l": {
            **ARMS[arm], "layers": layers, "adapter_layers": first, "tuned_as": arm,
        }
        for layers, first in sizes
        for arm in SIZED
    }  # fmt: skip


def _like(arm: str, rows: dict[str, dict]) -> dict[str, dict]:
    """Arms that take the rates of `arm` in TUNED."""
    return {name: {**row, "tuned_as": arm} for name, row in rows.items()}


def _pilot(names: Iterable[str]) -> dict[str, dict]:
    """The specialists with each change of scales.PILOT, where it changes what they do."""
    return {
        f"{arm}-{name}": {**ARMS[arm], **PILOT[name], "tuned_as": arm}
        for name in names
        for arm in SPECIALISTS
        if arm == "rank-only" or name not in ("bce", "20-candidates")
    }


def _ranks(*ranks: int) -> dict[str, dict]:
    """All experts at each rank, then each expert alone, the others at 16."""
    rows = {f"all-r{r}": (r,) * 3 for r in ranks}
    for name in THREE:
        for r in ranks:
            if r != 16:
                rows[f"{name}-r{r}"] = tuple(r if name == other else 16 for other in THREE)
    return _like("joint-moe", {name: {**SPARSEGEN, "ranks": row} for name, row in rows.items()})


# fmt: off
EXPERIMENTS = {
    "kill_gate": Experiment(
        question="Does training one model for retrieval and reranking cost either task?",
        expected="Neither outcome. What counts as a loss was fixed instead, by the rule below, and "
        "so was what would follow from each answer.",
        smoke_seeds=3,  # the whole rule is applied
        arms=ARMS,
        controls={
            # Matched by operations, over the same queries: half of joint-single's very batches, a
            # specialist's data twice. By tokens the doubles are 90 and 110 % of it at `small`.
            **_like("joint-single", {"joint-half": {"steps_factor": 0.5}}),
            **{f"{a}-double": {**ARMS[a], "steps_factor": 2.0, "tuned_as": a} for a in SPECIALISTS},
            **_like("joint-single", {"joint-2r": {"ranks": (32,)}, "joint-3r": {"ranks": (48,)}}),
            **_like("joint-moe", {
                "uniform-moe": {**MOE, "router": "uniform"},
                "oracle-moe": {**MOE, "router": "task"},
            }),
        },
        aa={f"{a}-aa": {**ARMS[a], "seed_offset": 1000, "tuned_as": a} for a in SPECIALISTS},
    ),
    "scale_study": Experiment(
        question="Does interference fade as the model grows?",
        expected="More capacity leaves room for both tasks, so interference should fall with depth "
        "and with rank.",
        arms=_ladder(LADDER["small"]),
        by_scale={scale: _ladder(steps) for scale, steps in LADDER.items()},
        controls={
            **{
                f"{arm}-r{rank}": {**ARMS[arm], "ranks": (rank,), "tuned_as": arm}
                for rank in (1, 4, 64) for arm in SIZED
            },
            **{f"{arm}-w64": {**ARMS[arm], "width_by_rank": 64, "tuned_as": arm} for arm in SIZED},
        },
        report="scale",
    ),
    "gradient_conflict": Experiment(
        question="Do the gradients of the two tasks conflict, where, and does routing part them?",
        expected="If sharing hurts because gradients conflict, their cosine should be negative in "
        "Joint-Single, less so between experts that a router has parted, and PCGrad should help.",
        arms={
            **{arm: ARMS[arm] for arm in ("joint-single", "joint-moe")},
            **_like("joint-single", {"pcgrad": {"pcgrad": True}}),
        },
        common={"probes": 4}, report="conflict", reference="joint-single",
        paired=(("pcgrad", "joint-single"),),
    ),
    "soft_vs_hard": Experiment(
        question="Does it matter how the experts are weighed: by task, by similarity, softly?",
        expected="Soft routing is said to let the tasks share what they have in common, so "
        "Sparsegen should beat the hard switches. But the kill gate saw its router weigh the "
        "experts alike for both tasks, so no difference to Uniform would surprise nobody.",
        arms={
            **{arm: ARMS[arm] for arm in SIZED},
            **_like("joint-moe", {
                "task": {**PAIR, "router": "task"},
                "task-shared": {**MOE, "router": "task", "always_on": "shared"},
                "similarity-mean": {**PAIR, "router": "similarity-mean"},
                "similarity-max": {**PAIR, "router": "similarity-max"},
                "sparsegen": SPARSEGEN,
                "uniform": {**MOE, "router": "uniform"},
            }),
        },
        controls=_like("joint-moe", {
            "sparsegen-plain": {**MOE, "router": "sparsegen"},  # no noise, no expert dropout
            "softmax": {**SPARSEGEN, "router": "softmax"},
            "tsallis": {**SPARSEGEN, "router": "tsallis"},
            "entmax15": {**SPARSEGEN, "router": "entmax15"},
            "token": {**SPARSEGEN, "per_token": True},
            "always-on": {**SPARSEGEN, "always_on": "shared"},
            "random": {**MOE, "router": "sparsegen", "router_frozen": True, "router_std": 1.0},
            "oracle": {**MOE, "router": "task"},
        }),
        report="routers", reference="sparsegen",
    ),
    "routing": Experiment(
        question="What does the router read: the task, its template, the domain?",
        expected="The templates differ, so a router could tell the tasks apart by them alone; the "
        "kill gate's did not use it. Without templates it should tell even less.",
        arms=_like("joint-moe", {"joint-moe": SPARSEGEN, "bare-moe": {**SPARSEGEN, **BARE}}),
        report="routes", reference="joint-moe", measures=("routing",),
    ),
    "representation": Experiment(
        question="Do the tasks share a subspace, and do the experts part it?",
        expected="Experts of one task should read and write in spaces of their own, the shared one "
        "between them; without routing the tasks' changes should overlap more.",
        arms={**ARMS, **_like("joint-moe", {"uniform-moe": {**MOE, "router": "uniform"}})},
        report="representations", reference="joint-single", measures=("representation",),
    ),
    "probing": Experiment(
        question="What does a pair's representation hold: matched terms, BM25, IDF, relevance?",
        expected="Rerankers are said to keep BM25's ingredients in their middle layers; an expert "
        "named for reranking should hold more of them than the others.",
        arms={arm: ARMS[arm] for arm in ("rank-only", "joint-single", "joint-moe")},
        report="probes", reference="joint-single", measures=("probing", "ablation"),
    ),
    "transfer": Experiment(
        question="Does what one task has learnt help the other, and through which expert?",
        expected="Retrieval and reranking both judge relevance, so an expert trained for one "
        "should help the other, and the shared expert should be where they meet.",
        arms={
            **{arm: ARMS[arm] for arm in SPECIALISTS},
            **_like("joint-moe", {
                "full": SPARSEGEN,
                "no-shared": {**SPARSEGEN, **PAIR},
                "isolated": {**PAIR, "router": "task"},
            }),
            **_like("rank-only", {
                "rerank-beside-embedding": {
                    **BESIDE, "tasks": ("reranking",), "start": ("embedding=emb-only",),
                    "frozen": ("embedding",),
                },
                "rerank-beside-nothing": {**BESIDE, **ARMS["rank-only"], "frozen": ("embedding",)},
            }),
            **_like("emb-only", {
                "embed-beside-reranking": {
                    **BESIDE, "tasks": ("embedding",), "start": ("reranking=rank-only",),
                    "frozen": ("reranking",),
                },
                "embed-beside-nothing": {**BESIDE, **ARMS["emb-only"], "frozen": ("reranking",)},
            }),
            **_like("rank-only", {
                "head-on-base": HEAD,
                "head-on-embedding": {**HEAD, "start": ("shared=emb-only",)},
                "head-on-reranking": {**HEAD, "start": ("shared=rank-only",)},
            }),
        },
        report="compare",
        contrasts=(
            ("full", "no-shared", "embedding", "what the shared expert adds"),
            ("full", "no-shared", "reranking", "what the shared expert adds"),
            ("no-shared", "isolated", "embedding", "what reaching the other's expert adds"),
            ("no-shared", "isolated", "reranking", "what reaching the other's expert adds"),
            ("rerank-beside-embedding", "rerank-beside-nothing", "reranking",
             "what a trained, frozen embedding expert adds"),
            ("embed-beside-reranking", "embed-beside-nothing", "embedding",
             "what a trained, frozen reranking expert adds"),
            ("head-on-embedding", "head-on-base", "reranking",
             "what embedding training holds for a new head"),
            ("head-on-reranking", "head-on-base", "embedding",
             "what reranking training does to retrieval"),
            ("head-on-reranking", "rank-only", "reranking",
             "what a new head loses on the reranking expert"),
        ),
        paired=(("head-on-reranking", "rank-only"),), smoke_seeds=1,
    ),
    "rank_sweep": Experiment(
        question="How much rank does each expert need?",
        expected="Little: one rank is said to be enough for a reranker (arXiv 2504.08780).",
        arms=_ranks(1, 4, 8, 16, 32),
        by_scale={"smoke": _ranks(1, 16)},
        report="ranks", reference="all-r16", smoke_seeds=1,
    ),
    "remedies": Experiment(
        question="Do simpler remedies than routing win back what sharing costs?",
        expected="If the loss comes from conflicting gradients, PCGrad or a better weighting of "
        "the losses wins some of it back without one more parameter; merging the specialists "
        "costs no joint training at all, and is said to lose some of both. (The tests against "
        "sharing were added when the first trials at `small` had been seen.)",
        arms={
            **ARMS,
            **_like("joint-single", {
                "pcgrad": {"pcgrad": True},
                **{
                    f"weight-{w}": {"embedding_weight": w / 50, "reranking_weight": 2 - w / 50}
                    for w in (10, 25, 75, 90)
                },
                "merged-mean": {**MERGED, "ranks": (32,), "merge_weight": 0.5},
                "merged-sum": {**MERGED, "ranks": (32,), "merge_weight": 1.0},
                **{
                    f"ties-{share}": {
                        **MERGED, "ranks": (64,), "merge": "ties", "merge_weight": 1.0,
                        "merge_density": share / 100,
                    }
                    for share in (20, 50)
                },
            }),
        },
        report="pareto", paired=(("pcgrad", "joint-single"),), smoke_seeds=1,
        contrasts=tuple(
            (arm, against, task, f"against {what}")
            for against, what in (("joint-single", "sharing"), ("joint-moe", "routing"))
            for arm in ("joint-moe", "pcgrad", "weight-10", "weight-25", "weight-75", "weight-90",
                        "merged-mean", "merged-sum", "ties-20", "ties-50")
            for task in ("embedding", "reranking")
            if arm != against
        ),
    ),
    "pointwise_vs_listwise": Experiment(
        question="A document, the list, or the list in the query: which gains more by routing?",
        expected="A list shows a document its rivals and makes their order matter. It is routed as "
        "one, so routing should add less; by pseudo-query (E2Rank) reranking is embedding: least.",
        arms={
            **_like("joint-single", {f"{mode}-single": head for mode, head in MODES.items()}),
            **_like("joint-moe", {f"{mode}-moe": SPARSEGEN | head for mode, head in MODES.items()}),
        },
        report="order", measures=("order",), smoke_seeds=1,
        contrasts=(
            *((f"{mode}-moe", f"{mode}-single", task, f"what routing adds, {mode}")
              for mode in MODES for task in ("embedding", "reranking")),
            *((f"{mode}-{kind}", f"pointwise-{kind}", "reranking", f"what {what} adds, {adapter}")
              for mode, what in (("listwise", "the list"), ("e2rank", "a pseudo-query"))
              for kind, adapter in (("single", "one LoRA"), ("moe", "MoE"))),
        ),
    ),
    "sweep": Experiment(
        question="Which learning rate and clipping suit each arm best on the dev split?",
        arms={
            f"{arm}-lr{rate:g}-clip{clip:g}": {**row, "learning_rate": rate, "clip": clip}
            for arm, row in ARMS.items()
            for rate, clip in SWEPT
        },
        seeds=1, common={"split": "dev"}, report="sweep",
    ),
    "pilot": Experiment(
        question="In which settings does each task learn in the time, on the dev split?",
        expected="An embedder learns at any depth; a cross-encoder needs depth and mean pooling.",
        arms=_pilot(PILOT),
        # The changes of the CPU default's depth, length and steps are nothing to the other scales.
        by_scale=dict.fromkeys(("smoke", "full"), _pilot(("as-is", "last-token", "bce"))),
        seeds=1, common={"split": "dev"}, report="pilot",
        own_base=("layers", "adapter_layers", "embedding_pooling", "reranking_pooling",
                  "document_tokens", "candidates"),
    ),
}
EXPERIMENTS["trained_baselines"] = Experiment(
    question="What do other ways to serve both tasks with one model reach, trained alike?",
    expected="A reranking LoRA on a frozen embedder keeps retrieval as it is, so the others have "
    "to beat what it reranks; a switch by task keeps the tasks apart at the same cost. (The other "
    "arms stand in the routers' experiment, where they are tested against each other; here that "
    "LoRA is tested against them, a choice made when its first trials had been seen.)",
    arms={
        **{arm: EXPERIMENTS["soft_vs_hard"].arms[arm] for arm in (
            "emb-only", "rank-only", "joint-single", "task", "similarity-mean", "similarity-max",
            "sparsegen")},
        **_like("rank-only", {"embedder-lora": ON_EMBEDDER}),
    },
    controls=_like("rank-only", {"base-lora": {**ON_BASE, **AS_QWEN3}}),
    report="compare",
    contrasts=(
        *(("embedder-lora", arm, "reranking", f"against {what}") for arm, what in (
            ("rank-only", "the specialist"), ("joint-single", "sharing"),
            ("task", "a switch by task"), ("similarity-mean", "similarity"),
            ("similarity-max", "similarity"), ("sparsegen", "soft routing"))),
        ("embedder-lora", "joint-single", "embedding", "against sharing"),
        ("embedder-lora", "sparsegen", "embedding", "against soft routing"),
        ("base-lora", "embedder-lora", "reranking", "without a trained embedder"),
    ),
)
# fmt: on


def arms(
    experiment: str, controls: bool = False, aa: bool = False, scale: str = "small"
) -> dict[str, dict]:
    """The arms of an experiment, in the order in which they run and are shown."""
    row = EXPERIMENTS[experiment]
    made = row.by_scale.get(scale, row.arms)
    return {**made, **(row.controls if controls else {}), **(row.aa if aa else {})}


def seeds(experiment: str, setting: str) -> int:
    """How many seeds an experiment has in a setting, such as `small-scifact`."""
    row = EXPERIMENTS[experiment]
    return min(row.smoke_seeds, row.seeds) if setting.split("-")[0] == "smoke" else row.seeds


def plain(experiment: str, scale: str, **overrides) -> Config:
    """The Config of the baselines, the same whatever arms decide. `overrides` (base, ...) win."""
    made = _scaled(experiment, scale, **overrides)
    return replace(made, **{name: getattr(Config(), name) for name in (*TUNED_FIELDS, "probes")})


def size_of(experiment: str, arm: str, scale: str) -> dict[str, Any]:
    """What an arm changes that makes the untrained base another one; {} for most arms."""
    row, plain = arms(experiment, True, True, scale)[arm], _scaled(experiment, scale)
    own = EXPERIMENTS[experiment].own_base
    return {k: row[k] for k in own if k in row and row[k] != getattr(plain, k)}


def baselines_name(size: dict[str, Any]) -> str:
    """The file of the baselines of a size: `baselines-8l.json`, `baselines-candidates-20.json`."""
    parts = {name: f"{name}-{value}" for name, value in size.items()}
    if "layers" in size:  # with which the first adapted layer goes
        parts = {**parts, "layers": f"{size['layers']}l", "adapter_layers": ""}
    return "-".join(["baselines", *filter(None, parts.values())]) + ".json"


def _scaled(experiment: str, scale: str, **overrides) -> Config:
    return replace(Config(), **{**SCALES[scale], **EXPERIMENTS[experiment].common, **overrides})


def config(experiment: str, arm: str, scale: str, seed: int, **overrides) -> Config:
    """The Config of one trial. `overrides` win over the arm, the arm over TUNED and the scale."""
    row = dict(arms(experiment, True, True, scale)[arm])
    factor, like = row.pop("steps_factor", 1.0), row.pop("tuned_as", arm)
    base, data = (overrides.get(name, getattr(Config(), name)) for name in ("base", "data"))
    if ratio := row.pop("width_by_rank", 0):
        row["ranks"] = (width(base) // ratio,)
    tuned = TUNED.get(setting_name(scale, base, data), {}).get(like, {})
    made = _scaled(experiment, scale, **{**tuned, **row, **overrides, "seed": seed})
    again = {"data_steps": made.steps} if factor not in (0.0, 1.0) else {}
    return replace(made, steps=round(made.steps * factor), **again)

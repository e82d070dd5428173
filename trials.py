"""What a trial and an experiment are, as data. Standard library only."""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin


def parts(text: str) -> list[str]:
    """The names or folders that `+` joins in `data` or `negatives`; a folder that is named just so
    is one."""
    return [text] if Path(text).is_dir() else text.split("+")


@dataclass(frozen=True)
class Config:
    """One trial, flat. Lengths are in tokens, `document_tokens` before truncation ends a text."""

    # What is trained
    tasks: tuple[str, ...] = ("embedding", "reranking")
    experts: tuple[str, ...] = ("shared",)
    ranks: tuple[int, ...] = (16,)
    alpha_over_rank: float = 2.0
    targets: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    lora_dropout: float = 0.0
    router: str = ""  # "" for no router, else a key of model.router.ROUTES
    router_hidden: int = 64
    router_noise: float = 0.0
    expert_dropout: float = 0.0
    task_prior: float = 0.0
    always_on: str = ""
    per_token: bool = False
    router_std: float = 0.02  # of the first weights of the router's last layer
    router_frozen: bool = False
    pilots: int = 4  # of each expert, for routing by similarity

    # Where it starts, if not untrained: "part=arm" begins as `part`, an expert or the head, was
    # trained in that arm with the same seed; "part=arm+arm" merges them
    start: tuple[str, ...] = ()
    merge: str = "linear"  # or "ties"
    merge_weight: float = 0.5  # lambda: of each change (linear), of the merged one (ties)
    merge_density: float = 0.2  # share of the entries that TIES keeps
    frozen: tuple[str, ...] = ()  # parts that training leaves as they are

    # On what
    base: str = "smollm2-135m"
    revision: str | None = None
    layers: int | None = None  # only the first n of the base; None: all
    adapter_layers: int = 0  # the first layer that has experts
    prefix: bool = True  # keep the states below it (needs adapter_layers > 0); not of lists
    dtype: str = "auto"  # model/processor.py says which
    causal: bool = True
    checkpointing: bool = False
    embedding_pooling: str = "last"
    reranking_pooling: str = "last"
    # Or "yes_no"; or of whole lists "interaction", "pseudo_query"
    rerank_head: str = "linear"
    query_prompt: str = "Query: {query}"
    document_prompt: str = "{document}"
    pair_prompt: str = "Query: {query}\nDocument: {document}"
    end_token: str = ""
    document_tokens: int = 512
    list_tokens: int = 8192  # of a query with its candidates; more of them make several texts
    data: str = "stdlib"  # fiqa+msmarco: trained on both, measured on the first
    measured_on: str = ""  # another collection, on which a trained model is measured
    mixture_temperature: float = 1.0  # T: steps of a collection in proportion to size^(1/T)
    split: str = "test"

    # How
    seed: int = 0
    seed_offset: int = 0  # other seeds for the same arm: the A/A control
    steps: int = 1000
    data_steps: int = 0  # train on what so many steps take; 0: `steps`
    train_queries: int = 0  # 0: all
    embedding_batch: int = 64
    hard_negatives: int = 1
    reranking_batch: int = 16  # groups
    group_size: int = 8  # one positive, the rest negatives
    negatives: str = "bm25"  # drawn from its top `negatives_depth`; or a folder that was mined
    negatives_sha256: str = ""  # of the mined file, put in where a trial starts
    negatives_depth: int = 50
    distill: str = ""  # "kl" or "margin_mse": learn the teacher's scores of the mined file as well
    distill_weight: float = 1.0
    distill_temperature: float = 1.0  # of kl
    reranking_loss: str = "listwise"  # or "bce"; heads that read lists have their own
    list_temperature: float = 0.05
    dispersive_weight: float = 0.45
    dual_weight: float = 0.85
    similarity_weight: float = 0.85  # 0: lists are not read a second time
    ranknet_scale: float = 10.0  # of a pseudo-query's cosines
    ranknet_weight: float = 2.0  # beside InfoNCE of the same lists
    temperature: float = 0.02
    false_negative_margin: float = 0.1
    # Widths below the hidden size at which the vectors' first values are trained too (Matryoshka)
    matryoshka: tuple[int, ...] = ()
    embedding_weight: float = 1.0
    reranking_weight: float = 1.0
    balance_weight: float = 0.01
    balance: str = "mean"
    penalty_weight: float = 0.01  # of Tsallis' entropy
    learning_rate: float = 1e-4
    head_learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.1  # share of the steps
    clip: float = 1.0
    pcgrad: bool = False  # drop from each task's gradient what conflicts with the other's
    # GradCache: how many tokens' activations are kept at once, 0 for a whole micro-batch
    cached_tokens: int = 0
    shard: bool = False  # of several processes each keeps a share of the base's weights (FSDP2)
    checkpoint_every: int = 50

    # Measured how
    scored: tuple[str, ...] = ()  # tasks that are measured, if not those that are trained
    retrieval_depth: int = 100
    candidates: int = 100  # BM25's own top k per query, nothing forced in
    reranking_queries: int = 0  # 0: all
    measured: int = 500  # texts of each kind on which a trained model is looked into
    probes: int = 0  # batches of each task, at most, in each half, whose gradients are watched

    def __post_init__(self):
        known = {"embedding", "reranking"}
        if not self.tasks or set(self.tasks) - known or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks must be some of embedding, reranking; got {self.tasks}")
        if self.reranking_loss not in ("listwise", "bce"):
            raise ValueError(f"reranking_loss is listwise or bce, got {self.reranking_loss!r}")
        for name in ("query_prompt", "document_prompt", "pair_prompt"):
            if "{instruction}" in getattr(self, name):
                raise ValueError(f"{name} has a place for an instruction: write it out instead")
        if self.group_size < 2:
            raise ValueError(f"group_size needs a positive and a negative, got {self.group_size}")
        if self.distill not in ("", "kl", "margin_mse"):
            raise ValueError(f"distill is kl, margin_mse or empty, got {self.distill!r}")
        if self.distill and self.negatives == "bm25":
            raise ValueError(
                f"distill={self.distill!r} needs a teacher's scores: set negatives to a folder of "
                "`python -m train mine --teacher`"
            )
        if self.distill and "embedding" in self.tasks and self.hard_negatives < 1:
            raise ValueError("distill compares a positive with hard negatives: hard_negatives is 0")
        widths = list(self.matryoshka)
        whole = all(isinstance(width, int) and width > 0 for width in widths)
        if not whole or widths != sorted(set(widths)):
            raise ValueError(f"matryoshka must be ascending widths of at least 1, got {widths}")
        for name in ("temperature", "list_temperature", "distill_temperature",
                     "mixture_temperature", "ranknet_scale", "clip"):  # fmt: skip
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be > 0 and finite, got {getattr(self, name)}")
        for name in ("learning_rate", "head_learning_rate", "weight_decay", "embedding_weight",
                     "reranking_weight", "balance_weight", "penalty_weight", "distill_weight",
                     "dispersive_weight", "dual_weight", "similarity_weight",
                     "ranknet_weight"):  # fmt: skip
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {getattr(self, name)}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is a share of the steps, 0 to 1, got {self.warmup}")
        if not 0 < self.merge_density <= 1:
            raise ValueError(f"merge_density is a share, above 0 to 1, got {self.merge_density}")
        if self.balance not in ("mean", "argmax", "support"):
            raise ValueError(f"balance is mean, argmax or support, got {self.balance!r}")
        least = {"steps": 0 if self.start else 1}
        for name in ("steps", "embedding_batch", "reranking_batch", "candidates"):
            if getattr(self, name) < least.get(name, 1):
                raise ValueError(
                    f"{name} must be at least {least.get(name, 1)}, got {getattr(self, name)}"
                )
        for name in ("train_queries", "reranking_queries", "hard_negatives", "probes",
                     "cached_tokens", "data_steps"):  # fmt: skip
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("checkpoint_every", "negatives_depth", "retrieval_depth", "document_tokens",
                     "list_tokens", "measured"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.probes and set(self.tasks) != known:
            raise ValueError(
                f"probes={self.probes} set one task's gradients against the other's: leave out the "
                f"arms that train {self.tasks} alone"
            )
        if self.probes and self.shard:
            raise ValueError("probes watch whole weights, of which shard keeps a share: use one")
        if "+" in self.measured_on and not Path(self.measured_on).is_dir():
            raise ValueError(f"measured_on is one collection, got {self.measured_on!r}: list them")
        if set(self.scored) - {"embedding", "reranking"}:
            raise ValueError(f"scored must be some of embedding, reranking; got {self.scored}")
        if self.merge not in ("linear", "ties"):
            raise ValueError(f"merge is linear or ties, got {self.merge!r}")
        parts = (*self.experts, "head")
        for name in (*self.starts(), *self.frozen):
            if name not in parts:
                raise ValueError(f"start and frozen name parts of {parts}, got {name!r}")
        if self.steps and set(self.frozen) >= set(parts):
            raise ValueError(f"frozen holds every part, {self.frozen}: nothing is left to train")

    def starts(self) -> dict[str, tuple[str, ...]]:
        """part -> the arms that it starts from."""
        pairs = [text.partition("=") for text in self.start]
        if odd := [text for text, pair in zip(self.start, pairs, strict=True) if not all(pair)]:
            raise ValueError(f"start lists PART=ARM or PART=ARM+ARM, got {odd}")
        return {part: tuple(arms.split("+")) for part, _, arms in pairs}

    def to_json(self) -> dict:
        return asdict(self)

    @staticmethod
    def completed(raw: dict[str, Any]) -> dict[str, Any]:
        """A stored config with the fields that have come since, at what changes nothing."""
        return json.loads(json.dumps(Config().to_json())) | raw

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "Config":
        lists: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        return cls(**lists)


@dataclass(frozen=True)
class Experiment:
    """question: what it answers. arms: name -> what differs from the scale's Config.

    seeds: how many; smoke_seeds: at that scale, which concludes nothing anyway.

    controls: further arms, run with CONTROLS=1; aa: those of AA=1. common: what all arms share.
    report: what is made of the trials, a key of analysis.reports.REPORTS.

    by_scale: scale -> the arms that take the place of `arms` there. measures: what is measured of
    every trained model, of analysis.measures.MEASURES. contrasts: (arm, against, task, what it
    would show), the differences that are tested; none: every arm against `reference`. paired:
    (arm, against) whose runs of one seed see the same batches and begin alike, or the one where the
    other ended, so that their scores are compared seed by seed.
    own_base: what makes the untrained base of an arm another one, where the arm changes it.

    Three keys of an arm are not fields of Config: `steps_factor` multiplies the scale's number of
    steps, over the same training queries, `tuned_as` names the arm whose row of TUNED it takes, if
    not its own, `width_by_rank` sets the rank to the base's width over it.
    """

    question: str
    arms: dict[str, dict]
    controls: dict[str, dict] = field(default_factory=dict)
    aa: dict[str, dict] = field(default_factory=dict)
    seeds: int = 3
    smoke_seeds: int = 2
    common: dict = field(default_factory=dict)
    report: str = "verdict"
    expected: str = ""
    reference: str = ""
    by_scale: dict[str, dict[str, dict]] = field(default_factory=dict)
    measures: tuple[str, ...] = ()
    contrasts: tuple[tuple[str, str, str, str], ...] = ()
    paired: tuple[tuple[str, str], ...] = ()
    own_base: tuple[str, ...] = ("layers", "adapter_layers")


def _short(data: str, whole: bool) -> str:
    """The end of a path or name; whole: of a benchmark's part the benchmark as well."""
    name = data if whole and not Path(data).is_dir() else Path(data).name
    return name.lower().replace("/", "-").replace(":", "-")


def setting_name(scale: str, base: str, data: str, measured_on: str = "") -> str:
    """`small`, `small-scifact`, `full-qwen3-0.6b-base-msmarco`: what is not the default; then
    `-on-fiqa` for what was trained there and is measured elsewhere."""
    named = [scale]
    if base != Config().base:
        named.append(Path(base).name.lower())
    if data != Config().data:
        named.append("+".join(_short(part, part.startswith("mteb/")) for part in parts(data)))
    if measured_on:
        named += ["on", _short(measured_on, True)]
    return "-".join(named)


# The hidden size of the bases of the study, for arms whose rank grows with it.
WIDTHS = {
    "smollm2-135m": 576, "Qwen/Qwen3-0.6B-Base": 1024, "Qwen/Qwen3-1.7B-Base": 2048,
    "Qwen/Qwen3-4B-Base": 2560, "Qwen/Qwen3-8B-Base": 4096, "mistralai/Mistral-7B-v0.3": 4096,
}  # fmt: skip


def width(base: str) -> int:
    """The hidden size of a base of the study, or of a local folder."""
    if base in WIDTHS:
        return WIDTHS[base]
    path = Path(base) / "config.json"
    if not path.exists():
        raise ValueError(f"the width of {base} is not known: add it to trials.WIDTHS")
    return json.loads(path.read_text())["hidden_size"]


def override(text: str) -> tuple[str, object]:
    """`name=value` for a field of Config, the value as JSON or a plain word."""
    name, equals, value = text.partition("=")
    own = {"base": "--base", "data": "--data", "split": "--split", "seed": "--seeds",
           "measured_on": "--evaluate"}  # fmt: skip
    if name in own:  # and what is run is filed under these
        raise ValueError(f"--set {text!r}: {name} has an option of its own, {own[name]}")
    kinds = {f.name: f.type for f in fields(Config)}
    if not equals or name not in kinds:
        raise ValueError(f"--set {text!r}: expected FIELD=VALUE with a field of trials.Config")
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = value
    kind = kinds[name] if get_origin(kinds[name]) is not tuple else list
    wanted = (kind, int) if kind is float else kind
    inside = get_args(kinds[name])[:1]  # of a tuple: tuple[int, ...]
    if isinstance("", wanted) and not isinstance(parsed, wanted):  # type: ignore[arg-type]
        parsed = value  # a commit may be all digits
    if (
        not isinstance(parsed, wanted)  # type: ignore[arg-type]
        or (isinstance(parsed, bool) and kind is not bool)  # which Python takes for an int
        or (isinstance(parsed, list) and not all(isinstance(item, inside) for item in parsed))
    ):
        raise ValueError(f"--set {text!r}: expected {kinds[name]}, as {getattr(Config(), name)!r}")
    return name, tuple(parsed) if isinstance(parsed, list) else parsed

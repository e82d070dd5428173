"""One trial: config -> model -> train -> evaluate -> the record that is stored."""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from eval.collections import Collection, load
from eval.machine import peak_bytes, reset_peak, trim_heap
from eval.protocol import EvaluationSet, Scores
from eval.provenance import made_by, sources
from eval.stages import Stages
from model import bases, parallel, sharding
from model.files import read_json
from model.layers import RMSNorm
from model.lora import LinearGroup, LoRAConfig
from model.prefix import LIMIT, TextSet, TokenIds, fingerprint, prefix_states
from model.processor import resolve_dtype
from model.router import SIMILARITY, RouterConfig
from model.tokens import Prompts
from model.unimoer import ModelConfig, UniMoER
from model.weights import revision
from train.batches import TrainingData
from train.loop import Callback, before, train
from train.mixture import training_data
from train.negatives import mined_sha256
from train.pilots import fit_pilots
from train.start import Held, begin, started_from
from trials import Config, parts

SCHEMA = 1
TRIM_EVERY = 4  # steps
MEASURED = ("measured_on", "split")  # what may differ between how it is trained and measured


def resolved(config: Config, device: str) -> Config:
    """The config as it is stored: the dtype of the device, the hash of mined negatives.

    A folder of the same name with other negatives is then another config.

    Raises:
        ValueError: see `mined_sha256`.
    """
    folders = parts(config.negatives)
    marks = ["" if folder == "bm25" else mined_sha256(Path(folder)) for folder in folders]
    dtype = resolve_dtype(config.dtype, device)
    return replace(config, dtype=dtype, negatives_sha256="+".join(marks))


def repeatable() -> None:
    """The same seed gives the same losses on a card: deterministic algorithms, where PyTorch has
    them, and cuBLAS with a fixed workspace. Attention's backward pass has one in strict mode alone;
    see `train.loop.strict`."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # It would also fill every new tensor with NaN, a pass over memory that checks nothing here.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def model_config(config: Config) -> ModelConfig:
    """The model part of a trial's Config."""
    lora = LoRAConfig(
        experts=config.experts,
        ranks=config.ranks,
        alphas=tuple(config.alpha_over_rank * r for r in config.ranks),
        targets=config.targets,
        first_layer=config.adapter_layers,
        dropout=config.lora_dropout,
    )
    router = None
    if config.router:
        router = RouterConfig(
            kind=config.router,
            hidden=config.router_hidden,
            always_on=config.always_on,
            noise=config.router_noise,
            expert_dropout=config.expert_dropout,
            task_prior=config.task_prior,
            per_token=config.per_token,
            init_std=config.router_std,
            frozen=config.router_frozen,
            pilots=config.pilots,
        )
    return ModelConfig(
        base=config.base,
        revision=config.revision,
        layers=config.layers,
        causal=config.causal,
        dtype=config.dtype,
        embedding_pooling=config.embedding_pooling,
        reranking_pooling=config.reranking_pooling,
        rerank_head=config.rerank_head,
        document_tokens=config.document_tokens,
        list_tokens=config.list_tokens,
        end_token=config.end_token,
        prompts=Prompts(config.query_prompt, config.document_prompt, config.pair_prompt),
        lora=lora,
        router=router,
        checkpointing=config.checkpointing,
    )


class Workbench:
    """What the trials of one process share: the collection, token ids, frozen-prefix states."""

    def __init__(
        self, data: str, device: str, cache: Path, keep_prefix: bool, kernels: str = "auto"
    ):
        made_by(device)  # the code as it is now, not when the first trial ends
        self.device, self.cache, self.keep_prefix = device, cache, keep_prefix
        self.kernels = kernels
        # Several are trained on together; the first is what is measured.
        self.collections = [load(part, cache / "data") for part in parts(data)]
        self.collection: Collection = self.collections[0]
        self._bases: dict[tuple[str, str | None], str] = {}
        self._sets: dict[str, TextSet] = {}
        self._evaluation: tuple[str, EvaluationSet] | None = None

    def model(self, config: Config) -> UniMoER:
        """A new model.

        Raises:
            ValueError: see `UniMoER`; or its vectors have no more values than a width of
                `matryoshka`.
        """
        seed = config.seed + config.seed_offset
        made = UniMoER(model_config(config), self.device, seed, self.kernels)
        hidden = made.decoder.config.hidden_size
        if config.matryoshka and config.matryoshka[-1] >= hidden:
            raise ValueError(
                f"matryoshka {config.matryoshka}: expected widths below {hidden}, the hidden size "
                f"of {config.base}; the whole vectors are trained in any case"
            )
        if config.shard:
            sharding.shard(made.decoder)
        return made

    def states(self, model: UniMoER, config: Config) -> Callable[[TokenIds, str], TextSet]:
        """Turns token ids into a TextSet, with prefix states where the config wants them.

        With `shard` the lower layers are run again: each process has but a share of their weights.
        """

        def make(ids: TokenIds, title: str) -> TextSet:
            if not config.prefix or config.shard or config.adapter_layers == 0 or not ids:
                return TextSet(ids)
            tokens = sum(len(row) for row in ids)
            if 2 * tokens * model.decoder.config.hidden_size > LIMIT:
                return TextSet(ids)  # the lower layers are run again each time
            of = f"{config.adapter_layers} {config.dtype} {config.causal} {model.identity}"
            found = self._sets.get(key := f"{of} {fingerprint(ids)}")
            if found is None:
                with (
                    parallel.first(),  # it makes the file, the others find it
                    tqdm(total=tokens, desc=title, unit="token", leave=False) as bar,
                ):

                    def advance(tokens: int, bar: tqdm = bar) -> None:
                        bar.update(tokens)
                        trim_heap()

                    states = prefix_states(
                        model.decoder,
                        ids,
                        str(model.identity["fingerprint"]),
                        self.cache / "prefix" if self.keep_prefix else None,
                        advance=advance,
                    )
                found = TextSet(ids, states)
                if not parallel.apart():
                    if self.keep_prefix:  # those of another depth are found on disk again
                        self._sets = {k: v for k, v in self._sets.items() if k.startswith(of)}
                    self._sets[key] = found
            return found

        return make

    def base_of(self, config: Config) -> str:
        """The fingerprint of the config's base."""
        key = config.base, config.revision
        if key not in self._bases:
            self._bases[key] = str(bases.identity(bases.resolve(*key))["fingerprint"])
        return self._bases[key]

    @property
    def mixture(self) -> str:
        """What is trained on beside the collection that is measured: names and fingerprints."""
        return ", ".join(f"{c.name} {c.fingerprint}" for c in self.collections[1:])

    def training(self, model: UniMoER, config: Config) -> TrainingData:
        """The training data of the config's tasks."""
        states = self.states(model, config)
        return training_data(self.collections, model.tokenizer, config, states)

    def evaluation(self, model: UniMoER, config: Config) -> EvaluationSet:
        """The evaluation set; one is kept, for trials that differ only in arm and seed.

        Apart from the other processes of a job nothing is kept: they would not have it, and who
        has something and who has not would then not wait for each other in the same places.
        """
        names = (
            "split", "retrieval_depth", "candidates", "reranking_queries", "document_tokens",
            "query_prompt", "document_prompt", "pair_prompt", "prefix",
            "adapter_layers", "layers", "dtype", "causal", "end_token", "rerank_head", "shard",
        )  # fmt: skip
        key = json.dumps([getattr(config, name) for name in names] + [model.identity])
        if self._evaluation and self._evaluation[0] == key:
            made = self._evaluation[1]
            return made.read_by(model.tokenizer) if parallel.apart() else made
        states = partial(self.states, config=config)
        made = EvaluationSet(self.collection, model.tokenizer, config, states)
        if not parallel.apart():
            self._evaluation = key, made
        return made


# Makes a callback of the training loop for a trial, or None.
Watch = Callable[[UniMoER, TrainingData, Config], Callback | None]


def run_trial(
    config: Config, arm: str, place: Path, bench: Workbench, watch: Watch | None = None
) -> dict:
    """Train and evaluate one arm with one seed; the result as it is stored.

    watch: what is to be measured during training; its numbers go into the curve.
    The trained model lies beside it as `<place>.model`, for `UniMoER.from_pretrained`. Seconds are
    those of the steps that were kept, also where the trial was stopped and gone on with.
    """
    reset_peak(bench.device)
    entered, earlier, started = time.perf_counter(), before(place), started_from(config, place)
    model = bench.model(config)
    merged = begin(model, config, place)
    sharding.renew(model.decoder)
    log, prepared = [], time.perf_counter()
    if config.steps:
        data = bench.training(model, config)
        if config.router in SIMILARITY:
            fit_pilots(model, data)
        prepared = time.perf_counter()
        watched = watch(model, data, config) if watch else None

        def after_step(step: int, line: dict) -> None:
            if watched is not None:
                watched(step, line)
            if step % TRIM_EVERY == 0:
                trim_heap()

        title = f"{arm} seed {config.seed}"
        origin = {
            "base": model.identity["fingerprint"], "data": bench.collection.fingerprint,
            "mixture": bench.mixture, "kernels": "triton" if model.decoder.fused else "torch",
            "start": started,
        }  # fmt: skip
        log = train(model, data, config, place, callback=after_step, title=title, origin=origin)
    trained = time.perf_counter()
    folder = place.with_name(place.name + ".model")
    if parallel.rank() == 0:
        model.save_pretrained(folder)
    parallel.wait()  # the others read what it is
    saved = time.perf_counter()
    path = place.with_name(place.name + ".json")
    keep = _pieces(path, config, bench, revision(folder))
    scores = _scores(model, config, bench, keep)
    seconds = {
        "prepare": prepared - entered,
        "train": earlier.seconds + trained - prepared,
        "test": time.perf_counter() - saved,
    }
    parameters = sum(p.numel() for p in model.trained().values())
    parameters = parameters - Held(model, config.frozen).count if config.steps else 0
    return {
        **_record(config, arm, bench, model, (*earlier.sources, *keep.begun)),
        "scores": scores,
        "curve": log,
        "trainable_parameters": parameters,
        "merged_energy": merged,
        **({"started_from": started} if started else {}),
        **({"watched_by": sources("analysis")} if config.probes else {}),
        "seconds": seconds,
        "peak_bytes": max(earlier.peak_bytes, peak_bytes(bench.device)),
    }


def measure_trial(config: Config, arm: str, source: Path, bench: Workbench, path: Path) -> dict:
    """A trained trial, measured on `config.measured_on`: its result with the scores there.

    Args:
        source: of the result where it was trained, <runs>/<experiment>/<setting>/<arm>/seed<k>.json
        bench: of the collection that is measured. path: where the result will be stored.
    Raises:
        ValueError: it is not finished there, or was trained with another config.
    """
    model_folder = source.with_suffix(".model")
    if not (source.exists() and model_folder.exists()):
        raise ValueError(f"there is no {source} with its model: train it before it is measured")
    trained = read_json(source, "remove it and train it again")
    wanted, was = json.loads(json.dumps(config.to_json())), Config.completed(trained["config"])
    if other := [k for k in wanted if k not in MEASURED and was[k] != wanted[k]]:
        shown = ", ".join(f"{k}: {was[k]!r}, not {wanted[k]!r}" for k in other)
        raise ValueError(f"{source} was trained with another config ({shown}): move it away first")
    reset_peak(bench.device)
    started = time.perf_counter()
    model = UniMoER.from_pretrained(model_folder, bench.device, kernels=bench.kernels)
    mark = revision(model_folder)
    keep = _pieces(path, config, bench, mark)
    scores = _scores(model, config, bench, keep)
    return {
        **trained,
        **_record(config, arm, bench, model, keep.begun),
        "trained": {k: trained[k] for k in ("data", "git", "sources", "versions", "device")}
        | {"model": mark},
        "scores": scores,
        "seconds": {**trained["seconds"], "test": time.perf_counter() - started},
        "peak_bytes": peak_bytes(bench.device),
    }


def _scores(model: UniMoER, config: Config, bench: Workbench, keep: Stages) -> dict[str, Scores]:
    """Task -> per-query metrics, of the tasks that are measured."""
    evaluation = bench.evaluation(model, config)
    trim_heap()
    return evaluation.scores(model, config.scored or config.tasks, keep)[0]


def _pieces(path: Path, config: Config, bench: Workbench, model: str) -> Stages:
    """Of the scores of a model, `weights.revision`, beside its result until that is stored."""
    of = {
        "model": model, "data": bench.collection.fingerprint, "config": config.to_json(),
        "device": torch.device(bench.device).type,  # not which: each process has its own
        "kernels": bench.kernels,
    }  # fmt: skip
    return Stages(path, of, renew=True)


def run_baselines(
    config: Config, bench: Workbench, show: Callable[[str, dict], None], path: Path | None = None
) -> dict:
    """BM25, the untrained base, and the ceiling of the candidates, as they are stored. path: where
    the result will be; its pieces lie beside it until then."""
    reset_peak(bench.device)
    model = bench.model(config)
    evaluation = bench.evaluation(model, config)
    bm25 = evaluation.bm25_scores()
    show("bm25", bm25)
    started = time.perf_counter()
    keep = path and _pieces(path, config, bench, model.identity["fingerprint"] or "")
    untrained = evaluation.untrained(model, progress=True, keep=keep)
    show("untrained base", untrained)
    return {
        **_record(config, "baselines", bench, model, keep.begun if keep else ()),
        "bm25": bm25,
        "untrained": untrained,
        "ceiling": {"reranking": evaluation.ceiling()},
        "clusters": evaluation.clusters,
        "pool": len(evaluation.documents),
        "seconds": {"test": time.perf_counter() - started},
        "peak_bytes": peak_bytes(bench.device),
    }


def _record(
    config: Config, arm: str, bench: Workbench, model: UniMoER, begun: Sequence[str] = ()
) -> dict:
    """What every result says about where it comes from. begun: the sources that made parts of it
    before it was stopped."""
    return {
        "schema": SCHEMA,
        "arm": arm,
        "seed": config.seed,
        "config": config.to_json(),
        "base": model.identity,
        "data": {
            "name": bench.collection.name,
            "fingerprint": bench.collection.fingerprint,
            **bench.collection.provenance,
            **({"mixture": bench.mixture} if bench.mixture else {}),
        },
        **made_by(bench.device, begun=begun),
        "body_parameters": _body_parameters(model),
        "width": model.decoder.config.hidden_size,
        "layers": model.decoder.config.num_hidden_layers,
        "processes": parallel.world(),
        "kernels": "triton" if model.decoder.fused else "torch",
    }


def _body_parameters(model: UniMoER) -> int:
    """Of the base, the embeddings left out."""
    modules = list(model.decoder.modules())
    groups = (m.layout for m in modules if isinstance(m, LinearGroup))
    norms = sum(m.weight.numel() for m in modules if isinstance(m, RMSNorm))
    return norms + sum(g.in_features * g.out_features for g in groups)

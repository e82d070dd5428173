"""The study's runner: `python -m run list | run | status | report | publish`.

One trial is config -> train -> evaluate -> one JSON under runs/<experiment>/<setting>/.
"""

import argparse
import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

import experiments
from analysis import report
from eval import metrics
from eval.collections import Collection, load
from eval.protocol import EvaluationSet
from experiments import Config
from model import bases
from model.lora import LoRAConfig
from model.prefix import TextSet, prefix_states
from model.router import RouterConfig
from model.tokens import Prompts
from model.unimoer import ModelConfig, UniMoER
from train.batches import TrainingData
from train.loop import forget, train

ROOT = Path(__file__).parent
SCHEMA = 1


def resolve_dtype(name: str) -> str:
    """`auto`: bfloat16 where the hardware multiplies it, else float32."""
    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if fast else "float32"


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
        end_token=config.end_token,
        prompts=Prompts(config.query_prompt, config.document_prompt, config.pair_prompt),
        lora=lora,
        router=router,
        checkpointing=config.checkpointing,
    )


class Workbench:
    """What the trials of one process share: the collection, token ids, frozen-prefix states."""

    def __init__(self, data: str, device: str, cache: Path, keep_prefix: bool):
        self.device, self.cache, self.keep_prefix = device, cache, keep_prefix
        self.collection: Collection = load(data, cache / "data")
        self._sets: dict[str, TextSet] = {}
        self._evaluation: dict[str, EvaluationSet] = {}

    def model(self, config: Config) -> UniMoER:
        return UniMoER(model_config(config), self.device, config.seed + config.seed_offset)

    def states(self, model: UniMoER, config: Config) -> Callable[[list[list[int]], str], TextSet]:
        """Turns token ids into a TextSet, with prefix states where the config wants them."""

        def make(ids: list[list[int]], title: str) -> TextSet:
            if not config.prefix or config.adapter_layers == 0:
                return TextSet(ids)
            text = json.dumps([ids, config.adapter_layers, config.dtype, model.identity])
            key = hashlib.sha256(text.encode()).hexdigest()
            if key not in self._sets:
                tokens = sum(len(row) for row in ids)
                with tqdm(total=tokens, desc=title, unit="token", leave=False) as bar:
                    states = prefix_states(
                        model.decoder,
                        ids,
                        str(model.identity["fingerprint"]),
                        self.cache / "prefix" if self.keep_prefix else None,
                        advance=bar.update,
                    )
                self._sets[key] = TextSet(ids, states)
            return self._sets[key]

        return make

    def evaluation(self, model: UniMoER, config: Config) -> EvaluationSet:
        """The evaluation set; trials that differ only in arm and seed share one."""
        names = (
            "split", "retrieval_depth", "candidates", "reranking_queries", "document_tokens",
            "query_prompt", "document_prompt", "pair_prompt", "reranking_pooling", "prefix",
            "adapter_layers", "layers", "dtype",
        )  # fmt: skip
        key = json.dumps([getattr(config, name) for name in names] + [model.identity])
        if key not in self._evaluation:
            self._evaluation[key] = EvaluationSet(
                self.collection, model.tokenizer, config, self.states(model, config)
            )
        return self._evaluation[key]


def run_trial(config: Config, arm: str, place: Path, bench: Workbench) -> dict:
    """Train and evaluate one arm with one seed; the result as it is stored."""
    started = time.perf_counter()
    model = bench.model(config)
    data = TrainingData(bench.collection, model.tokenizer, config, bench.states(model, config))
    prepared = time.perf_counter()
    log = train(model, data, config, place, title=f"{arm} seed {config.seed}")
    trained = time.perf_counter()
    evaluation = bench.evaluation(model, config)
    scores = {}
    if "embedding" in config.tasks:
        scores["embedding"] = evaluation.retrieval(model, progress=True)
    if "reranking" in config.tasks:
        scores["reranking"] = evaluation.reranking(model, progress=True)
    ended = time.perf_counter()
    seconds = {"prepare": prepared - started, "train": trained - prepared, "test": ended - trained}
    parameters = sum(p.numel() for p in model.trained().values())
    return {
        **_record(config, arm, bench, model),
        "scores": scores,
        "curve": log,
        "trainable_parameters": parameters,
        "seconds": seconds,
        "peak_bytes": _peak_bytes(bench.device),
    }


def run_baselines(config: Config, bench: Workbench) -> dict:
    """BM25, the untrained base, and the ceiling of the candidates, as they are stored."""
    model = bench.model(config)
    evaluation = bench.evaluation(model, config)
    bm25 = evaluation.bm25_scores()
    show_row("bm25", None, bm25)
    started = time.perf_counter()
    untrained = evaluation.untrained(model, progress=True)
    show_row("untrained base", None, untrained)
    return {
        **_record(config, "baselines", bench, model),
        "bm25": bm25,
        "untrained": untrained,
        "ceiling": {"reranking": evaluation.ceiling()},
        "clusters": evaluation.clusters,
        "pool": len(evaluation.documents),
        "seconds": {"test": time.perf_counter() - started},
        "peak_bytes": _peak_bytes(bench.device),
    }


def _record(config: Config, arm: str, bench: Workbench, model: UniMoER) -> dict:
    """What every result says about where it comes from."""
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
        },
        "git": _git(),
        "sources": _sources(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "tokenizers", "bm25s")},
        },
        "device": _device(bench.device),
    }


def _git() -> dict:
    def ask(*words: str) -> str | None:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    changed = ask("status", "--porcelain", "--untracked-files=no")
    return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(changed)}


def _sources() -> str:
    """One hash over the modules that produce numbers."""
    digest = hashlib.sha256()
    for folder in ("kernels", "model", "eval", "train"):
        for path in sorted((ROOT / folder).glob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _device(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _peak_bytes(device: str) -> int:
    """Of the process so far: on the card where there is one, else resident."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_json(path: Path, content: dict) -> None:
    """Whole or not at all: a temporary name, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with open(part, "w") as file:
        json.dump(content, file, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def stored(path: Path, config: Config) -> dict | None:
    """An earlier result with this config, or None.

    Raises:
        ValueError: it was made with another config.
    """
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    old, new = result["config"], json.loads(json.dumps(config.to_json()))
    if old != new:
        differ = [k for k in new if old.get(k) != new[k]] + sorted(old.keys() - new.keys())
        shown = ", ".join(f"{k}: {old.get(k)!r} there, {new.get(k)!r} here" for k in differ)
        raise ValueError(f"{path} was made with another config ({shown}): move it away first")
    if result["sources"] != _sources():
        print(f"warning: the source has changed since {path} was made", file=sys.stderr)
    return result


def show_row(arm: str, seed: int | None, scores: dict) -> None:
    """One row of the running table: nDCG@10 of each task."""
    cells = [
        f"{metrics.mean(scores[task], 'ndcg_cut_10'):.4f}" if task in scores else "-"
        for task in ("embedding", "reranking")
    ]
    name = arm if seed is None else f"{arm} seed {seed}"
    print(f"{name:<24} retrieval {cells[0]:>7}   reranking {cells[1]:>7}", flush=True)


def setting_name(scale: str, base: str, data: str) -> str:
    """`small`, `small-scifact`, `full-qwen3-0.6b-base-msmarco`: what is not the default."""
    parts = [scale]
    for value, default in ((base, Config().base), (data, Config().data)):
        if value != default:
            parts.append(Path(value).name.lower())
    return "-".join(parts)


def command_run(args: argparse.Namespace) -> None:
    overrides = {
        key: value
        for key, value in (("base", args.base), ("data", args.data), ("split", args.split))
        if value
    }
    overrides |= dict(_override(text) for text in args.set)
    chosen = experiments.arms(args.experiment, args.controls, args.aa)
    if args.arms:
        known = experiments.arms(args.experiment, True, True)
        unknown = [arm for arm in args.arms if arm not in known]
        if unknown:
            raise ValueError(f"unknown arms {unknown}: {args.experiment} has {list(known)}")
        chosen = {arm: known[arm] for arm in args.arms}
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = setting_folder(args)
    seeds = args.seeds or experiments.EXPERIMENTS[args.experiment].seeds
    trials = []
    for seed in range(seeds):
        for arm in chosen:
            config = experiments.config(args.experiment, arm, args.scale, seed, **overrides)
            trials.append((arm, replace(config, dtype=resolve_dtype(config.dtype))))
    first = trials[0][1]
    bench = Workbench(first.data, device, bases.cache_folder(), not args.no_prefix_cache)
    print(f"{args.experiment} {folder.name}: {len(trials)} trials on {_device(device)}")
    plain = replace(first, **{**_arm_free(), "seed": 0})
    baselines = folder / "baselines.json"
    if (result := stored(baselines, plain)) is None:
        write_json(baselines, run_baselines(plain, bench))
    else:
        show_row("bm25", None, result["bm25"])
        show_row("untrained base", None, result["untrained"])
    for arm, config in trials:
        place = folder / arm / f"seed{config.seed}"
        path = place.with_suffix(".json")
        if (result := stored(path, config)) is None:
            result = run_trial(config, arm, place, bench)
            write_json(path, result)
        forget(place)
        show_row(arm, config.seed, result["scores"])
    command_report(args)


def _arm_free() -> dict:
    """The fields of a Config that an arm decides, at their defaults: for the baselines."""
    names = ("tasks", "experts", "ranks", "router", "router_noise", "expert_dropout", "task_prior",
             "always_on", "seed_offset", "steps")  # fmt: skip
    return {name: getattr(Config(), name) for name in names}


def _override(text: str) -> tuple[str, object]:
    """`name=value` for a field of Config, the value as JSON or a plain word."""
    name, equals, value = text.partition("=")
    if not equals or name not in Config().to_json():
        raise ValueError(f"--set {text!r}: expected FIELD=VALUE with a field of experiments.Config")
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = value
    return name, tuple(parsed) if isinstance(parsed, list) else parsed


def setting_folder(args: argparse.Namespace) -> Path:
    base, data = args.base or Config().base, args.data or Config().data
    return Path(args.runs) / args.experiment / setting_name(args.scale, base, data)


def command_list(args: argparse.Namespace) -> None:
    for name, row in experiments.EXPERIMENTS.items():
        print(f"{name}: {row.question}")
        for title, arms in (("arms", row.arms), ("controls", row.controls), ("A/A", row.aa)):
            if arms:
                print(f"  {title}: {', '.join(arms)}")


def command_status(args: argparse.Namespace) -> None:
    """Which trials of a setting are finished, begun or missing."""
    folder = setting_folder(args)
    seeds = args.seeds or experiments.EXPERIMENTS[args.experiment].seeds
    for arm in experiments.arms(args.experiment, args.controls, args.aa):
        for seed in range(seeds):
            path = folder / arm / f"seed{seed}.json"
            begun = path.with_suffix(".log.jsonl").exists()
            print(f"{path}: {'done' if path.exists() else 'begun' if begun else 'missing'}")


def command_report(args: argparse.Namespace) -> None:
    folder = setting_folder(args)
    verdict = report.write(folder)
    print(report.summary(verdict))
    print(f"report: {folder / 'report.md'}")


def command_publish(args: argparse.Namespace) -> None:
    """Copy a finished setting to results/: trials, verdict, report and figures."""
    folder = setting_folder(args)
    report.write(folder)
    target = ROOT / "results" / args.experiment / folder.name
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    ignore = shutil.ignore_patterns("*.checkpoint", "*.log.jsonl", ".*")
    shutil.copytree(folder, part, ignore=ignore)
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    print(f"published to {target}")


COMMANDS = {
    "list": command_list,
    "run": command_run,
    "status": command_status,
    "report": command_report,
    "publish": command_publish,
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m run", description=__doc__)
    commands = made.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        sub = commands.add_parser(name, help=COMMANDS[name].__doc__)
        if name == "list":
            continue
        sub.add_argument("experiment", choices=list(experiments.EXPERIMENTS))
        sub.add_argument("--scale", choices=list(experiments.SCALES), default="small")
        sub.add_argument("--base", default="", help="a name from model/bases.py, hub id or folder")
        sub.add_argument("--data", default="", help="stdlib, a BEIR name, msmarco or a folder")
        sub.add_argument("--seeds", type=int, default=0, help="how many; 0: the experiment's own")
        sub.add_argument("--runs", default="runs", help="folder of the trials")
        sub.add_argument("--controls", action="store_true", help="the control arms as well")
        sub.add_argument("--aa", action="store_true", help="an A/A pair as arms of its own")
        if name == "run":
            sub.add_argument("--arms", nargs="*", default=[], help="only these")
            sub.add_argument("--split", default="", help="what is measured: test (default) or dev")
            sub.add_argument("--device", default="", help="cpu or cuda; default: what there is")
            sub.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
            sub.add_argument(
                "--no-prefix-cache", action="store_true", help="keep no states on disk"
            )
    return made


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        COMMANDS[args.command](args)
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The study's runner: `python -m run list | run | status | report | publish | check`.

One trial is config -> train -> evaluate -> one JSON under runs/<experiment>/<setting>/.
"""

import argparse
import shutil
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import experiments
from analysis import (
    across,
    disk,
    gradients,
    leaderboard,
    measures,
    overview,
    reports,
    reuse,
    tracking,
)
from eval import benchmarks, hub, rule, stages
from eval.collections import require_split
from eval.command import job_status
from eval.machine import device_name
from eval.provenance import made_by, sources
from kernels.choice import KERNELS, use_triton
from model import bases, parallel
from model.config import DTYPES
from model.files import put_over, read_json, write_json
from scales import SCALES
from train.loop import NonFiniteLoss, forget, owned
from train.mixture import training_steps
from train.start import check_starts, model_of
from train.trial import (
    Workbench,
    measure_trial,
    model_config,
    repeatable,
    resolved,
    run_baselines,
    run_trial,
)
from trials import Config, override, parts

ROOT = Path(__file__).parent


def show_baselines(path: Path, plain: Config, bench: Workbench, size: dict) -> None:
    """Their rows, computed where no experiment of this setting has them."""
    of = "".join(f", {name} {value}" for name, value in size.items())
    with stages.held(path):
        if (result := reuse.stored(path, plain, bench)) is None:
            if (result := reuse.baselines_elsewhere(path, plain, bench)) is None:
                show = reports.show_row
                result = run_baselines(plain, bench, lambda arm, s: show(arm + of, None, s), path)
                return stages.finish(path, result)
            stages.finish(path, result)
        stages.discard(path)  # of a process that was killed within `finish`
    reports.show_row("bm25", None, result["bm25"])
    reports.show_row("untrained base" + of, None, result["untrained"])


def chosen_arms(args: argparse.Namespace) -> dict[str, dict]:
    """The arms that a run is asked for."""
    if not args.arms:
        return experiments.arms(args.experiment, args.controls, args.aa, args.scale)
    if args.controls or args.aa:
        raise ValueError("--arms names all arms that are run: leave out --controls and --aa")
    known = experiments.arms(args.experiment, True, True, args.scale)
    if unknown := [arm for arm in args.arms if arm not in known]:
        raise ValueError(f"unknown arms {unknown}: {args.experiment} has {list(known)}")
    return {arm: known[arm] for arm in args.arms}


def check_elsewhere(args: argparse.Namespace, chosen: dict[str, dict], folder: Path) -> None:
    """Refuse what could give no verdict elsewhere, before anything is trained."""
    for option in ("evaluate", "mteb"):
        if not getattr(args, option):
            continue
        if experiments.EXPERIMENTS[args.experiment].report != "verdict":
            raise ValueError(f"--{option}: {args.experiment} has no verdict to be given elsewhere")
        # What is not run now may have been measured before: at home for MTEB, else there.
        home = [folder] if option == "mteb" else [setting_folder(args, d) for d in args.evaluate]
        absent = [arm for arm in rule.NEEDED if arm not in chosen
                  and not all([*place.glob(f"{arm}/seed*.json")] for place in home)]  # fmt: skip
        if absent:
            raise ValueError(f"--{option} decides by {', '.join(rule.NEEDED)}: run "
                             f"{', '.join(absent)} too")  # fmt: skip


def planned(
    args: argparse.Namespace, chosen: dict[str, dict], overrides: dict, device: str
) -> list[tuple[str, Config]]:
    """The trials of a run, (arm, config), one seed of all arms after the other."""
    seeds = args.seeds or experiments.seeds(args.experiment, args.scale)
    if seeds < 1:
        raise ValueError(f"--seeds {seeds}: expected at least 1")
    trials = []
    for seed in range(seeds):
        for arm in chosen:
            config = experiments.config(args.experiment, arm, args.scale, seed, **overrides)
            trials.append((arm, resolved(config, device)))
    made, where = {}, {k: v for k, v in overrides.items() if k in ("base", "data", "split")}
    for arm, config in trials:
        other = made.setdefault(config, arm)
        # Planned twins, such as a rank that a width happens to give, stand for each other.
        apart = {experiments.config(args.experiment, a, args.scale, config.seed, **where)
                 for a in (arm, other)}  # fmt: skip
        if len(apart) > 1 and other != arm:
            raise ValueError(
                f"--set makes {other} and {arm} the same trial: leave out what sets them apart, or "
                "choose other --arms"
            )
    return trials


def command_run(args: argparse.Namespace) -> None:
    sources("analysis")  # of measures: as it is now, not when the first is taken
    trained = parts(args.data or Config().data)
    own = hub.own_split(trained[0])  # as its authors measure it
    split = args.split or (own if own != Config().split else None)
    given = ("base", args.base), ("data", args.data), ("split", split)
    overrides = {key: value for key, value in given if value}
    overrides |= dict(override(text) for text in args.set)
    chosen, folder = chosen_arms(args), setting_folder(args)
    fresh, computed, began = not Path(args.runs).exists(), 0, time.perf_counter()
    args.evaluate, absent = benchmarks.each(args.evaluate, bases.cache_folder() / "data", trained)
    check_elsewhere(args, chosen, folder)
    tasks = leaderboard.named(args.mteb) if args.mteb else []
    if args.wandb:
        tracking.wandb_init(args.wandb)  # what cannot work is said at once
    device = parallel.join(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    trials = planned(args, chosen, overrides, device)
    check_starts(trials, folder)
    first = trials[0][1]
    use_triton(args.kernels, device, DTYPES[first.dtype])  # what cannot work is said at once
    if device.startswith("cuda"):
        repeatable()
    options = device, bases.cache_folder(), not args.no_prefix_cache, args.kernels
    bench = Workbench(first.data, *options)
    for _, config in trials:  # what cannot work is said before anything is computed
        model_config(config)
    lengths = ("steps", "tasks", "train_queries", "embedding_batch", "reranking_batch",
               "data_steps", "hard_negatives", "group_size")  # fmt: skip
    for config in {tuple(getattr(c, n) for n in lengths): c for _, c in trials}.values():
        training_steps(bench.collections, config)
    for data in args.evaluate:
        replace(first, measured_on=data)  # which refuses what is none
        require_split(Workbench(data, *options).collection, args.split or hub.own_split(data))
    if parallel.rank() == 0:
        of = f"{parallel.world()} x " if parallel.world() > 1 else ""
        on = f"{len(trials)} trials on {of}{device_name(device)}"
        print(f"{args.experiment} {folder.name}: {on}")
    sizes = [{}, *(experiments.size_of(args.experiment, arm, args.scale) for arm in chosen)]
    for name, size in {experiments.baselines_name(size): size for size in sizes}.items():
        plain = experiments.plain(args.experiment, args.scale, **{**size, **overrides})
        plain = resolved(plain, device)
        show_baselines(folder / name, plain, bench, size)
    rows_after = time.perf_counter() - began
    for arm, config in trials:
        place = folder / arm / f"seed{config.seed}"
        path = place.with_suffix(".json")
        if (result := reuse.stored(path, config, bench)) is None:
            with owned(place), tracking.tracked(args.wandb, place, config) as track:
                # Another process may have finished it since.
                result = reuse.stored(path, config, bench) or reuse.taken_over(path, config, bench)
                if result is None:
                    computed += 1
                    result = run_trial(config, arm, place, bench, track.beside(gradients.watch))
                stages.finish(path, result)
                track.end(result)
        reports.show_row(arm, config.seed, result["scores"])
        if parallel.rank() == 0:
            with parallel.alone():
                forget(place)
                stages.discard(path)
                for name in experiments.EXPERIMENTS[args.experiment].measures:
                    measures.look_into(place, name, config, bench)
    if parallel.rank() == 0:
        print(reports.write(args.experiment, folder), f"report: {folder / 'report.md'}", sep="\n")
        if fresh and computed == len(trials):  # so it can be told how long they take
            seconds = time.perf_counter() - began
            row = {"seconds": seconds, "baselines_after": rows_after, "trials": computed}
            row |= {"dtype": first.dtype, "processes": parallel.world()}
            write_json(folder / "took.json", row | made_by(device))
            print(f"{computed} trials took {seconds / 60:.1f} minutes")
    plain = resolved(experiments.plain(args.experiment, args.scale, **overrides), device)
    # One collection at a time: all of BEIR fits into few machines.
    folders = [evaluate(d, Workbench(d, *options), args, plain, trials) for d in args.evaluate]
    if folders and parallel.rank() == 0:
        print(across.write(folder, folders, absent))
    parallel.wait()  # the last time: what follows takes hours, and the others are not needed
    if tasks and parallel.rank() == 0:
        with parallel.alone():
            print(leaderboard.write(folder, tasks, device, args.kernels, folders))


def evaluate(
    data: str, bench: Workbench, args: argparse.Namespace, plain: Config,
    trials: list[tuple[str, Config]],
) -> Path:  # fmt: skip
    """Measure trained trials on another collection, as a setting with a verdict of its own."""
    there = {"measured_on": data, "split": args.split or hub.own_split(data)}
    folder = setting_folder(args, data)
    show_baselines(folder / "baselines.json", replace(plain, **there), bench, {})
    for arm, trained in trials:
        config, place = replace(trained, **there), folder / arm / f"seed{trained.seed}"
        path = place.with_suffix(".json")
        source = setting_folder(args) / arm / f"seed{trained.seed}.json"
        with stages.held(path):
            result = reuse.stored(path, config, bench)
            known = result and result["trained"].get("model"), model_of(source)
            if all(known) and known[0] != known[1]:
                raise ValueError(
                    f"{path} is of another model than {source}, which was trained anew: move "
                    f"{folder} away first"
                )
            if result is None:
                result = measure_trial(config, arm, source, bench, path)
                stages.finish(path, result)
            stages.discard(path)
        reports.show_row(arm, config.seed, result["scores"])
    if parallel.rank() == 0:
        print(reports.write(args.experiment, folder), f"report: {folder / 'report.md'}", sep="\n")
    return folder


def setting_folder(args: argparse.Namespace, measured_on: str = "") -> Path:
    base, data = args.base or Config().base, args.data or Config().data
    name = experiments.setting_name(args.scale or "small", base, data, measured_on)
    return Path(args.runs) / args.experiment / name


def command_list(args: argparse.Namespace) -> None:
    for name, row in experiments.EXPERIMENTS.items():
        print(f"{name}: {row.question}")
        for title, arms in (("arms", row.arms), ("controls", row.controls), ("A/A", row.aa)):
            if arms:
                print(f"  {title}: {', '.join(arms)}")


def command_status(args: argparse.Namespace) -> None:
    """Which trials of a setting are finished, begun or missing."""
    folder = setting_folder(args, args.measured_on)
    for arm in experiments.arms(args.experiment, args.controls, args.aa, args.scale):
        for seed in range(args.seeds or experiments.seeds(args.experiment, args.scale)):
            path = folder / arm / f"seed{seed}.json"
            begun = path.with_suffix(".log.jsonl").exists()
            print(f"{path}: {'done' if path.exists() else 'begun' if begun else 'missing'}")


def command_report(args: argparse.Namespace) -> None:
    """Write reports from trials: of one experiment or all with overviews, of one setting or all."""
    only, runs, write = args.experiment, Path(args.runs), partial(reports.write, tables=args.latex)
    if only and only not in experiments.EXPERIMENTS:
        known = ", ".join(experiments.EXPERIMENTS)
        raise ValueError(f"unknown experiment {only!r}: there are {known}")
    one = [setting_folder(args, args.measured_on).name]
    named = args.scale or args.base or args.data or args.measured_on
    with overview.told_together(write) as each:
        for setting in one if named else overview.settings(runs, only) or one:
            if only:
                folder = runs / only / setting
                print(each(only, folder), f"report: {folder / 'report.md'}", sep="\n")
            elif readings := overview.write(runs, setting, each):
                print(*readings.values(), f"overview: {runs / setting}.md", sep="\n")
            else:
                print(f"no trial of {setting} lies under {runs}: `make study` makes them")


def command_check(args: argparse.Namespace) -> None:
    """Fail if a published report no longer follows from its trials."""
    if found := overview.stale(ROOT / "results", reports.write):
        raise ValueError(
            f"published reports do not follow from their trials: {', '.join(found)}. Write them "
            "again with `python -m run report --runs results`, and look at what changed"
        )
    print("published reports follow from their trials")


def command_publish(args: argparse.Namespace) -> None:
    """Copy a finished setting to results/: trials, verdict, report and figures."""
    folder = setting_folder(args, args.measured_on)
    arms = experiments.arms(args.experiment, scale=args.scale)
    seeds = experiments.seeds(args.experiment, args.scale)
    absent = [f"{arm} {seed}" for arm in arms for seed in range(seeds)
              if not (folder / arm / f"seed{seed}.json").exists()]  # fmt: skip
    for name in experiments.EXPERIMENTS[args.experiment].measures:
        for arm in arms:
            there = [(folder / disk.measure_file(arm, name, s)).exists() for s in range(seeds)]
            absent += [f"{name} of {arm} {s}" for s in range(seeds) if any(there) and not there[s]]
    if absent and not args.partial:
        raise ValueError(
            f"{folder} lacks {len(absent)} results (arm, seed): {', '.join(absent)}. Run them, or "
            "publish what there is with --partial: the report names what is missing"
        )
    # What cannot be reported is not published.
    reports.write(args.experiment, folder, tables=(folder / "tables.tex").exists())
    target = ROOT / "results" / args.experiment / folder.name
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    ignore = shutil.ignore_patterns(
        "*.checkpoint", "*.part", "*.log.jsonl", "*.model", "*.features", ".*"
    )
    shutil.copytree(folder, part, ignore=ignore)
    for path in [*part.glob("baselines*.json"), *part.glob("*/*seed[0-9]*.json")]:
        write_json(path, overview.portable(read_json(path, "run it again")))
    put_over(part, target)
    # A report of sizes takes in the settings of other bases; a page those of other collections.
    kind = experiments.EXPERIMENTS[args.experiment].report
    places = sorted(target.parent.glob("[!.]*"))  # without what a killed process left
    shown = [p for p in places if p != target and target.name.startswith(p.name)]
    for place in {"scale": places, "verdict": [target, *shown]}.get(kind, [target]):
        overview.write(ROOT / "results", place.name, reports.write)
    print(f"published to {target}")


COMMANDS = {
    "list": command_list,
    "run": command_run,
    "status": command_status,
    "report": command_report,
    "check": command_check,
    "publish": command_publish,
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m run", description=__doc__)
    commands = made.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        sub = commands.add_parser(name, help=COMMANDS[name].__doc__)
        if name in ("list", "check"):
            continue
        if name == "report":
            sub.add_argument("experiment", nargs="?", default="", help="none: all that were run")
            sub.add_argument("--latex", action="store_true", help="the tables as tables.tex too")
        else:
            sub.add_argument("experiment", choices=list(experiments.EXPERIMENTS))
        sub.add_argument("--scale", choices=[*SCALES], default="" if name == "report" else "small")
        sub.add_argument("--base", default="", help="a name from model/bases.py, hub id or folder")
        sub.add_argument("--data", default="", help="stdlib, a BEIR name, msmarco, mteb/TASK or a "
                         "folder; A+B: trained on both, measured on A")  # fmt: skip
        sub.add_argument("--runs", default="runs", help="folder of the trials")
        if name in ("run", "status"):
            sub.add_argument("--seeds", type=int, default=0, help="0: the experiment's own number")
            sub.add_argument("--controls", action="store_true", help="the control arms as well")
            sub.add_argument("--aa", action="store_true", help="an A/A pair as arms of its own")
        if name != "run":
            sub.add_argument("--measured-on", default="", metavar="DATA",
                             help="what was measured there with --evaluate")  # fmt: skip
        if name == "publish":
            sub.add_argument("--partial", action="store_true", help="although trials are missing")
        if name == "run":
            sub.add_argument("--arms", nargs="*", default=[], help="only these")
            sub.add_argument("--evaluate", nargs="+", default=[], metavar="DATA",
                             help="measure what was trained on these as well; groups too: "
                             "all (BEIR's 18), cqadupstack, bright, miracl, mmarco")  # fmt: skip
            sub.add_argument("--mteb", nargs="+", default=[], metavar="NAME", help="tasks and "
                             "benchmarks of mteb that decide for the embedding side")  # fmt: skip
            sub.add_argument("--split", default="", help="default: test, or its authors' own")
            sub.add_argument("--device", default="", help="cpu or cuda; default: what there is")
            sub.add_argument(
                "--kernels", choices=KERNELS, default="auto", help="auto: triton on cuda"
            )
            sub.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
            sub.add_argument("--wandb", default="", metavar="PROJECT", help="of Weights & Biases: "
                             "log there too, offline without WANDB_MODE")  # fmt: skip
            sub.add_argument(
                "--no-prefix-cache", action="store_true", help="keep no states on disk"
            )
    return made


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    return job_status(partial(COMMANDS[args.command], args), NonFiniteLoss)


if __name__ == "__main__":
    sys.exit(main())

"""Results that stand: a trial's own, and those of one experiment for another's, so that the same
trial is trained once."""

import json
import os
import shutil
import sys
from pathlib import Path

from analysis import gradients
from analysis.disk import read
from eval.machine import device_name
from eval.provenance import made_by, sources
from model import parallel
from train.start import started_from
from train.trial import Workbench
from trials import Config

NEEDS = ("base", "data", "config", "sources", "versions", "device")  # of a result, to be taken


def stored(path: Path, config: Config, bench: Workbench) -> dict | None:
    """An earlier result with this config, on these data and this base, or None.

    Raises:
        ValueError: it was made with another config, data or base, or on the other kernels where
            these were asked for by name.
    """
    if not path.exists():
        return None
    result = read(path, *NEEDS)
    old, new = Config.completed(result["config"]), json.loads(json.dumps(config.to_json()))
    if old != new:
        differ = [k for k in new if old.get(k) != new[k]] + sorted(old.keys() - new.keys())
        shown = ", ".join(f"{k}: {old.get(k)!r} there, {new.get(k)!r} here" for k in differ)
        raise ValueError(f"{path} was made with another config ({shown}): move it away first")
    if other := _differs(result, config, bench):
        raise ValueError(
            f"{path} is of another {' and '.join(other)} ({', '.join(other.values())}): move it "
            "away first"
        )
    now, was = started_from(config, path), result.get("started_from", {})
    if other := [arm for arm in now if was.get(arm) and now[arm] and was[arm] != now[arm]]:
        raise ValueError(
            f"{path} began as {', '.join(other)}, trained anew since: move it away first"
        )
    watched = sources("analysis")
    if result["sources"] != sources() or result.get("watched_by", watched) != watched:
        print(f"warning: the source has changed since {path} was made", file=sys.stderr)
    return result


def _differs(result: dict, config: Config, bench: Workbench) -> dict[str, str]:
    """What a result is of, beside its config, where that is not what there is here; as text."""
    data, kernels = result["data"], result.get("kernels", "torch")
    pairs = {
        "data": (data["fingerprint"], bench.collection.fingerprint),
        "data beside": (data.get("mixture", ""), bench.mixture),
        "base": (result["base"]["fingerprint"], bench.base_of(config)),
        "kernels": (kernels, kernels if bench.kernels == "auto" else bench.kernels),
    }
    return {
        name: f"{name}: {there} there, {here} here"
        for name, (there, here) in pairs.items()
        if there != here
    }


def same(result: dict, config: Config, bench: Workbench) -> bool:
    """Whether a stored result is of this config, source, data and device."""
    return (
        result["config"] == json.loads(json.dumps(config.to_json()))
        and result["sources"] == sources()
        and result["device"] == device_name(bench.device)
        and result["versions"] == made_by(bench.device)["versions"]
        and not _differs(result, config, bench)
    )


def baselines_elsewhere(path: Path, plain: Config, bench: Workbench) -> dict | None:
    """The same baselines of another experiment of this setting."""
    for other in sorted(path.parents[2].glob(f"*/{path.parent.name}/baselines*.json")):
        result = read(other, *NEEDS)
        if same(result, plain, bench):
            return result
    return None


def taken_over(path: Path, config: Config, bench: Workbench) -> dict | None:
    """The same trial of another experiment: its result, the trained model linked beside `path`.

    A trial whose gradients were watched trains like one that is left alone, so it stands for both.
    One that starts from others depends on more than its config, and stands for none.
    """
    if config.start:
        return None
    folder = path.parent.parent
    for other in sorted(folder.parent.parent.glob(f"*/{folder.name}/*/{path.name}")):
        result = read(other, *NEEDS)
        if not config.probes:
            result = gradients.unwatched(result)
        model = other.with_suffix(".model")
        if same(result, config, bench) and model.exists():
            if parallel.rank() == 0:
                _link(model, path.with_suffix(".model"))
                print(f"{path.parent.name} seed {config.seed} is the same trial as {other}")
            return result | {"arm": path.parent.name}
    return None


def _link(model: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(model, target, copy_function=os.link)

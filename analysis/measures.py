"""What is measured of trained models beside their scores, and where it is kept."""

import json
import sys
import time
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from analysis.disk import read
from eval.provenance import made_by
from model.files import write_json
from model.unimoer import UniMoER
from model.weights import revision
from train.trial import Workbench
from trials import Config

# Each a module of `analysis` with measure(model, evaluation set, training data of both tasks when
# called, the trial's config and place) -> what <arm>/<name>-seed<k>.json holds. They are imported
# when they are needed: scikit-learn alone takes a second.
MEASURES = ("routing", "representation", "probing", "ablation", "order")


def measure(name: str, *of: Any) -> dict[str, Any] | None:
    assert name in MEASURES, name
    return import_module(f"analysis.{name}").measure(*of)


def look_into(place: Path, name: str, config: Config, bench: Workbench) -> None:
    """Measure a trained model, unless that was done with this config, on these data and beside the
    same other models; nothing where there is nothing to measure.

    Args:
        place: runs/<experiment>/<setting>/<arm>/seed<k>, of the trial. name: of `MEASURES`.
    """
    path = place.with_name(f"{name}-{place.name}.json")
    saved = place.with_name(f"{place.name}.model")
    made = made_by(bench.device, "analysis")
    of = {
        "model": revision(saved),
        "config": json.loads(json.dumps(config.to_json())),
        "data": bench.collection.fingerprint,
        "beside": _beside(place) if name == "representation" else {},
    }
    old = read(path) if path.exists() else {}
    known = old | {"config": Config.completed(old.get("config", {}))}
    if {k: known.get(k) for k in of} == of:
        if old["sources"] != made["sources"]:
            print(f"warning: the source has changed since {path} was made", file=sys.stderr)
        return
    started = time.perf_counter()
    model = UniMoER.from_pretrained(saved, bench.device, kernels="torch")
    both = replace(config, tasks=("embedding", "reranking"))
    data = partial(bench.training, model, both)
    found = measure(name, model, bench.evaluation(model, config), data, config, place)
    if found is not None:
        seconds = {"measure": time.perf_counter() - started}
        write_json(path, {**made, **of, "seconds": seconds, **found})


def _beside(place: Path) -> dict[str, str]:
    """arm -> what its model is, of the arms that a representation is held against."""
    before = import_module("analysis.representation").before(place.parent.name)
    folders = {arm: place.parent.parent / arm / f"{place.name}.model" for arm in before}
    return {arm: revision(folder) for arm, folder in folders.items() if folder.exists()}

"""What a result says of the code, versions, device and prompts that made it."""

import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from eval.machine import device_name
from model.config import ModelConfig
from model.files import read_json
from model.pseudo import PseudoQuery
from model.router import TASKS

ROOT = Path(__file__).parent.parent
CODE = ("kernels", "model", "eval", "train")  # what produces the numbers of trials


@cache
def _git() -> dict:
    """Of the code as it was when first asked for: what is edited later does not run here. dirty: a
    module is not the commit's. Both None where git is not installed or knows of no commit."""

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changed = ask("status", "--porcelain", *CODE, "analysis", "bench", ":(glob)*.py")
    return {"commit": ask("rev-parse", "HEAD"), "dirty": None if changed is None else changed != ""}


def remember() -> None:
    """Look at the code now; what is edited later does not run here, and no result names it."""
    _git()
    sources()


def made_by(device: str, *more: str, begun: Iterable[str] = ()) -> dict:
    """The commit, sources, versions and device that make a result.

    Args:
        more: see `sources`.
        begun: the sources that made what was gone on with; named where they are others.
    """
    others = sorted({*begun} - {sources(*more)})
    return {
        "git": _git(),
        "sources": sources(*more),
        **({"begun_by_sources": others} if others else {}),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "tokenizers", "bm25s")},
        },
        "device": device_name(device),
    }


def prompts(
    config: ModelConfig,
    instruction: str = "",
    tasks: Iterable[str] = TASKS,
    asked: PseudoQuery | None = None,
) -> dict[str, str]:
    """What a model reads around the texts of these tasks: templates, and the instruction of a list,
    whose other words are `model.listwise`'s and `model.pseudo`'s.

    Args:
        instruction: a benchmark's own; "": the model's.
        asked: it reranks by this one, not by its head.
    """
    own = config.prompts.instructed(instruction) if instruction else config.prompts
    names = ["query", "document"] if "embedding" in tasks else []
    found = {}
    if "reranking" in tasks:
        if asked or config.rerank_head == "pseudo_query":
            names.append("document")
            found["instruction"] = (asked or PseudoQuery()).instruction
        elif not config.listwise:
            names.append("pair")
        elif instruction:
            found["instruction"] = instruction
    return {name: own.filled(name) for name in names} | found


def stored(place: Path, of: dict[str, Any], another: str = "--name") -> dict | None:
    """The result that lies at `place`, None where there is none. Of other code it is taken too, and
    that is said.

    Args:
        of: what it must be of: name in the result -> JSON value; a dot leads into an object.
        another: the option that would file the new one elsewhere.
    Raises:
        ValueError: it is of something else, or damaged.
    """
    if not place.exists():
        return None
    result = read_json(place, "remove it, it is made again")
    different: dict[str, tuple[Any, Any]] = {}
    for name, wanted in json.loads(json.dumps(of)).items():
        found = result
        for key in name.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        different |= _differ(name, found, wanted)
    if different:
        told = "; ".join(f"{k}: {a!r} there, {b!r} now" for k, (a, b) in different.items())
        raise ValueError(
            f"{place} is of another model, data, setting or device ({told}): move it away, or give "
            f"another {another}"
        )
    warn_of_other_code(place, result)
    return result


def warn_of_other_code(place: Path, made: dict[str, Any]) -> None:
    """Say so if the result at `place` was made by other code than this, or by nobody knows which.

    Args:
        made: what is told of it; see `made_by`.
    """
    if made.get("sources") != sources():
        print(f"warning: the source has changed since {place} was made", file=sys.stderr)


def _differ(name: str, there: Any, now: Any) -> dict[str, tuple[Any, Any]]:
    """Name -> the two values, of what differs, as deep as both are objects."""
    if there == now:
        return {}
    if not (isinstance(there, dict) and isinstance(now, dict)):
        return {name: (there, now)}
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted(there.keys() | now.keys()):
        found |= _differ(f"{name}.{key}", there.get(key), now.get(key))
    return found


@cache
def sources(*more: str) -> str:
    """One hash over the modules that produce the numbers of trials, as they were when first asked
    for. more: folders beside theirs."""
    digest = hashlib.sha256()
    for folder in (*CODE, *more):
        for path in sorted((ROOT / folder).glob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()

"""What a result says of the code, versions and device that made it."""

import hashlib
import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

from eval.machine import device_name

ROOT = Path(__file__).parent.parent


@cache
def _git() -> dict:
    """Of the code as it was when first asked for: what is edited later does not run here. dirty: a
    module is not the commit's."""

    def ask(*words: str) -> str | None:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    changed = ask("status", "--porcelain", "--untracked-files=no", "*.py")
    return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(changed)}


def made_by(device: str, *more: str) -> dict:
    """The commit, sources, versions and device that make a result. more: see `sources`."""
    return {
        "git": _git(),
        "sources": sources(*more),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "tokenizers", "bm25s")},
        },
        "device": device_name(device),
    }


@cache
def sources(*more: str) -> str:
    """One hash over the modules that produce the numbers of trials, as they were when first asked
    for. more: folders beside theirs."""
    digest = hashlib.sha256()
    for folder in ("kernels", "model", "eval", "train", *more):
        for path in sorted((ROOT / folder).glob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()

"""Times of rivals in one run, and what a benchmark's record says about the machine."""

import os
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
import triton
from tqdm import tqdm

from eval import provenance

PACKAGES = ("triton", "transformers", "peft", "sentence-transformers")


def seconds(rivals: Mapping[str, Callable[[int], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each rival in each round; they take turns, so a slow minute hits all of them.

    Args:
        rivals: name -> what is timed, called with the round's number. One round before the first
            (number 0 again) warms up and is not counted. The order turns around in every round.
    Returns:
        name -> `rounds` times in seconds, by round, device work included.
    """
    found: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in tqdm([0, *range(rounds)], desc=" | ".join(rivals), unit="round", leave=False):
        order = list(rivals.items())
        for name, run in order if turn % 2 else reversed(order):
            started = time.perf_counter()
            run(turn)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            found[name].append(time.perf_counter() - started)
    return {name: times[1:] for name, times in found.items()}


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles (linear between the neighbours)."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q1": low, "q3": high}


def against(times: dict[str, list[float]], work: Sequence[float]) -> dict:
    """A row's numbers of `ours` and `theirs`: rounds, work per second of each, and the ratio."""
    return {
        "rounds": len(work),
        **rates(times, work),
        "ratio": ratio(times, "ours", "theirs"),
    }


def best(run: Callable[[Any], object], options: Sequence, work: float) -> tuple[Any, dict]:
    """Which option a rival is fastest with, by two rounds of each: it, and the rates by option."""
    tried = {str(option): lambda turn, option=option: run(option) for option in options}
    found = rates(seconds(tried, 2), [work] * 2)
    return max(options, key=lambda option: found[str(option)]["median"]), {"searched": found}


def rates(times: dict[str, list[float]], work: Sequence[float]) -> dict[str, dict[str, float]]:
    """name -> median and quartiles of work per second; `work` is what was done in each round."""
    return {
        name: spread([w / t for w, t in zip(work, row, strict=True)]) for name, row in times.items()
    }


def ratio(times: dict[str, list[float]], ours: str, against: str) -> dict[str, float]:
    """Median and quartiles of how many times as fast ours is, taken round by round."""
    pairs = zip(times[ours], times[against], strict=True)
    return spread([theirs / mine for mine, theirs in pairs])


def made_by(device: str) -> dict:
    """Device, driver, threads, versions, sources and commit, as a record tells them."""
    made = provenance.made_by(device, "bench", ".")
    made["versions"] |= {name: version(name) for name in PACKAGES}
    return {
        **made,
        "driver": _driver(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _driver() -> str | None:
    """The version of NVIDIA's driver, None without a card."""
    if not torch.cuda.is_available():
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 else None


def peak(
    run: Callable[[int], object], device: str, clear: Callable[[], object] = lambda: None
) -> int | None:
    """Bytes on the card that a call takes at the most beside what is there before it, in its
    second call; None on a CPU. clear: drops what the first call has left, gradients say."""
    run(0)
    if device == "cpu":
        return None
    clear()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def milliseconds(run: Callable[[], object], device: str, budget: float = 200.0) -> dict[str, float]:
    """Median and quartiles of one call. On a card the cache is cleared before each call.

    Args:
        budget: about how many milliseconds of calls are timed.
    """
    if device != "cpu":
        quantiles: Any = triton.testing.do_bench(
            run, rep=round(budget), quantiles=[0.5, 0.25, 0.75]
        )
        return dict(zip(("median", "q1", "q3"), quantiles, strict=True))
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < budget:
        started = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - started))
    return spread(times)


def stem(*words: str) -> str:
    """A file's name from what it is about: `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")

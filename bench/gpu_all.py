"""`make gpu-all`: everything that only a card can show, in order of value, in steps of minutes.

Each step is a command with a limit. A step that ends well is not run again; one that meets its
limit, or measures less than all in its time, goes on in the next call (bench keeps its parts, the
kill gate its trials), and what needs it waits. After each step
bench/results/<device>-summary.md says what is done, how long it took, and what is not measured.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from analysis.figures import table
from bench import costs
from bench.shapes import SHAPES
from bench.timing import stem
from eval.machine import device_name
from eval.provenance import sources
from model import bases
from model.files import read_json, write_text

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
SCALE, DATA = "full", "stdlib"  # of the kill gate
GOES_ON = "stopped at its limit, goes on in the next call"
ANEW = "stopped at its limit, begins anew in the next call"
TAIL = 12  # lines of a step's output that the summary keeps


@dataclass(frozen=True)
class Step:
    """A command, what it shows, and after how many minutes it is stopped.

    record: a JSON file whose `left_out` says what the command had no time for.
    after: the step that must be done before. resumable: a stopped one goes on where it was.
    """

    name: str
    shows: str
    command: list[str]
    minutes: float = 7.5
    record: Path | None = None
    after: str = ""
    resumable: bool = True


def memory_settings(memory: float) -> list[str]:
    """Of the kill gate, so that it fits a card of so many bytes by what `make plan` predicts."""
    arms = costs.arms(SCALE, bases.DEFAULT, DATA)
    shape, counts = SHAPES[bases.DEFAULT], costs.COLLECTIONS[DATA]
    option, _ = costs.fitting(shape, arms["joint-moe"], counts, memory)
    checkpointing = option is None or option.checkpointing  # more cannot be asked for
    return ["--set", "checkpointing=true"] if checkpointing else []


def steps(python: str, device: str, memory: float) -> list[Step]:
    """memory: of the card, in bytes."""
    kill_gate = ["kill_gate", "--scale", SCALE]
    # Most of the tests' time is the compilation of kernels, which several processes share out.
    several = ["-n", str(min(8, os.cpu_count() or 1))]
    return [
        Step("test-gpu", "the kernels and the model are right on this card",
             [python, "-m", "pytest", "-m", "gpu", "-q", *several], resumable=False),
        Step("bench", "speed and memory, beside the predictions of bench-model",
             [python, "-m", "bench", "--minutes", "5"],
             record=RESULTS / f"{stem(device, bases.DEFAULT)}.json"),
        Step("kill-gate", "the study at full scale",
             [python, "-m", "run", "run", *kill_gate, *memory_settings(memory)]),
        Step("publish", "its trials, verdict and report in results/",
             [python, "-m", "run", "publish", *kill_gate], 1, after="kill-gate",
             resumable=False),
        Step("bench-model", "predictions and measurements side by side",
             [python, "-m", "bench.model"], 1, after="publish", resumable=False),
    ]  # fmt: skip


def run(step: Step, folder: Path) -> dict:
    """Run a step; its output goes to a file, its last lines into the record."""
    log, started = folder / f"{step.name}.log", time.monotonic()
    with open(log, "w") as file:
        try:
            code = subprocess.run(
                step.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                timeout=60 * step.minutes,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = None
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    shown = [line for line in lines if line.strip() and "it/s" not in line][-TAIL:]
    late = GOES_ON if step.resumable else ANEW
    state = {0: "done", None: late}.get(code, f"failed with exit code {code}")
    if state == "done" and step.record and json.loads(step.record.read_text())["left_out"]:
        state = GOES_ON
    return {
        "state": state,
        "seconds": time.monotonic() - started,
        "tail": shown,
        "sources": sources("analysis", "bench", "."),
    }


def summary(device: str, record: dict[str, dict], listed: list[Step]) -> str:
    rows = []
    for step in listed:
        found = record.get(step.name)
        state = "not measured" if found is None else found["state"]
        minutes = "-" if found is None else f"{found['seconds'] / 60:.1f}"
        rows.append([step.name, step.shows, state, minutes])
    text = f"# {device}\n\nBy `make gpu-all`.\n\n"
    text += table(["step", "shows", "state", "minutes"], rows)
    for step in listed:
        if step.name in record:
            text += f"\n## {step.name}\n\n```\n" + "\n".join(record[step.name]["tail"]) + "\n```\n"
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_all", description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="these steps, done or not")
    parser.add_argument("--runs", default=str(ROOT / "runs" / "gpu_all"), help="logs and state")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu-all: skipped, torch sees no CUDA device")
        return 0
    device, folder = device_name("cuda"), Path(given.runs)
    folder.mkdir(parents=True, exist_ok=True)
    name = stem(device)
    state = folder / f"{name}.json"
    record = read_json(state, "remove it") if state.exists() else {}
    memory = torch.cuda.get_device_properties(0).total_memory
    listed, failed = steps(sys.executable, device, memory), False
    if unknown := set(given.only) - {step.name for step in listed}:
        known = ", ".join(step.name for step in listed)
        parser.error(f"--only {', '.join(sorted(unknown))}: there are {known}")

    def done(name: str) -> bool:
        """With the code as it is now; a changed test alone is not seen."""
        found = record.get(name, {})
        return found.get("state") == "done" and found.get("sources") == sources(
            "analysis", "bench", "."
        )

    for step in listed:
        if given.only and step.name not in given.only:
            continue
        if not given.only and (done(step.name) or step.after and not done(step.after)):
            continue
        print(f"gpu-all: {step.name}, at most {step.minutes:g} minutes", flush=True)
        record[step.name] = run(step, folder)
        failed |= record[step.name]["state"].startswith("failed")
        print(f"gpu-all: {step.name} {record[step.name]['state']}", flush=True)
        write_text(state, json.dumps(record, indent=1))
        write_text(RESULTS / f"{name}-summary.md", summary(device, record, listed))
    left = [step.name for step in listed if not done(step.name)]
    print(f"written to {RESULTS / name}-summary.md" + f"; left: {', '.join(left)}" * bool(left))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""The kernels compile for cards that are not here, and the check of their code can fail."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.compiled import CARDS, Code, problems

ROOT = Path(__file__).parents[2]
T4, A100, H100 = CARDS
GOOD = Code(registers=64, local=0, shared=1024, matrix=8, dots=True)


@pytest.mark.parametrize(
    ("card", "code", "expected"),
    [
        (A100, GOOD, []),
        (A100, replace(GOOD, local=8), ["spills 8 bytes"]),
        (T4, replace(GOOD, shared=65537), ["shared memory, a block has 65536"]),
        (H100, replace(GOOD, shared=65537), []),
        (A100, replace(GOOD, matrix=0), ["without matrix instructions"]),
        (A100, replace(GOOD, matrix=0, dots=False), []),
        (T4, replace(GOOD, matrix=0), []),  # Triton has none there
        (H100, replace(GOOD, matrix=0, local=4), ["spills 4", "without matrix"]),
    ],
)
def test_problems(card, code, expected) -> None:
    found = problems(code, card)
    assert len(found) == len(expected)
    assert all(part in text for part, text in zip(expected, found, strict=True))


def rows(text: str) -> set[tuple[str, ...]]:
    """(kernel, card, shape)"""
    lines = [line for line in text.splitlines() if " (sm_" in line and line.startswith("| ")]
    return {tuple(line.strip("| ").split(" | ")[:3]) for line in lines}


def test_one_shape_compiles_for_every_card() -> None:
    """In a process of its own: here Triton's interpreter is on. The committed table has the kernels
    that are launched, on each card and in each shape, and no other."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.compiled", "--quick"],
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for kernel in (
        "add_rmsnorm_pool._forward", "add_rmsnorm_pool._backward", "qk_norm_rope._forward",
        "qk_norm_rope._backward", "swiglu._forward", "swiglu._backward", "route._forward",
        "route._backward", "shrink._gate_backward", "sparsegen._forward", "sparsegen._backward",
        "segments._sum_chunks",
    ):  # fmt: skip
        assert done.stdout.count(f"| {kernel} |") == 3, kernel
    assert done.stdout.count("| shrink._shrink | ") == 2  # by Triton on sm_80 and sm_90
    assert done.stdout.count("| shrink._gate | T4") == 1  # after cuBLAS on the T4
    text = (ROOT / "bench" / "results" / "kernels.md").read_text()
    shapes = ("qwen3-0.6b", "qwen3-4b", "mistral-7b")
    every = {(kernel, card, shape) for kernel, card, _ in rows(done.stdout) for shape in shapes}
    assert rows(text) == every, "run `make kernels-report`"
    assert f"{len(every)} rows, 0 that fail" in text

"""What a measurement says of the machine."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eval.machine import peak_bytes, reset_peak

ROOT = Path(__file__).resolve().parents[2]
PARENT = """
import subprocess, sys
block = b"x" * (1 << 30)  # written, so resident
words = [sys.executable, "-c", "from eval.machine import peak_bytes; print(peak_bytes('cpu'))"]
sys.exit(subprocess.run(words).returncode)
"""


def test_the_peak_of_a_card_is_that_card_s(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda card: asked.append(card) or 7)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.append)
    reset_peak("cuda:1")
    assert peak_bytes("cuda:1") == 7 and asked == ["cuda:1", "cuda:1"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="of Linux's counters")
def test_a_process_does_not_begin_with_the_peak_of_its_parent() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    assert 50 << 20 < int(done.stdout) < 1 << 30


def test_the_peak_stays_when_memory_is_given_back() -> None:
    reset_peak("cpu")
    before = peak_bytes("cpu")
    block = b"x" * (256 << 20)
    grown = peak_bytes("cpu")
    assert grown > before + (200 << 20)
    del block
    assert peak_bytes("cpu") > 0.99 * grown  # the kernel counts in batches

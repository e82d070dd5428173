"""What a measurement says of the machine it ran on, and what it asks of it."""

import contextlib
import ctypes
import os
import resource
import sys
from pathlib import Path

import torch

from model import processor

# oneDNN keeps a compiled primitive for each of the last 1024 shapes it saw, and PyTorch's layer
# over it as many of its own. Every batch has another number of tokens, so that is up to 1 GB which
# nothing asks for again; one training step has about 40 shapes. Both are read at the first use.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")


def device_name(device: str) -> str:
    """The card, or the processor and how many threads torch uses."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{processor.name()}, {torch.get_num_threads()} threads"


def peak_bytes(device: str) -> int:
    """Of the process since `reset_peak`, or its start: on the card where there is one, else
    resident."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux, whose ru_maxrss begins with the peak of the process that forked
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak(device: str) -> None:
    """What `peak_bytes` says from now on is of what comes. (Not on a CPU that is not Linux's.)"""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak begins at what is there


def trim_heap() -> None:
    """Give freed memory back to the system (glibc).

    Every batch has another number of tokens, so every block another size, and blocks that small
    survivors keep apart are never joined: without this training grows by 7 MB a step.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)

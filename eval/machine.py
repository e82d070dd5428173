"""What a measurement says of the machine it ran on."""

import platform
import resource
import sys
from pathlib import Path

import torch


def device_name(device: str) -> str:
    """The card, or the processor and how many threads torch uses."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = (models or [platform.processor() or platform.machine()])[0]
    return f"{processor}, {torch.get_num_threads()} threads"


def peak_bytes(device: str) -> int:
    """Of the process so far: on the card where there is one, else resident."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

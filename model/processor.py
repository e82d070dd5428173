"""What a processor is, and what it multiplies."""

import platform
from pathlib import Path

import torch


def name() -> str:
    """Of the CPU, as the system calls it."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (models or [platform.processor() or platform.machine()])[0]


def resolve_dtype(name: str, device: str) -> str:
    """`auto`: bfloat16 where the device multiplies it, else float16 on a card, float32 on a CPU."""
    if name != "auto":
        return name
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if fast else "float32"

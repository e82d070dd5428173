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


def resolve_dtype(dtype: str, device: str) -> str:
    """`auto`: bfloat16 where the device multiplies it faster than float32; else float16 on a card,
    float32 on a CPU."""
    if dtype != "auto":
        return dtype
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return "bfloat16" if _bfloat16_is_faster() else "float32"


def _bfloat16_is_faster() -> bool:
    """Where AMX multiplies it, or AVX512-BF16 of AMD's make (twice as fast as float32, by
    bench/results); an Intel Xeon with AVX512-BF16 alone ran at half the speed of float32. Told by
    the make, not by a clock: a trial that is started again must find the dtype that it had."""
    if torch.cpu._is_amx_tile_supported():
        return True
    return torch.cpu._is_avx512_bf16_supported() and "AMD" in name()

"""What a processor is, and what it multiplies."""

import functools
import platform
import time
from pathlib import Path

import torch


def name() -> str:
    """Of the CPU, as the system calls it."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (models or [platform.processor() or platform.machine()])[0]


def resolve_dtype(name: str, device: str) -> str:
    """`auto`: bfloat16 where the device multiplies it faster than float32; else float16 on a card,
    float32 on a CPU."""
    if name != "auto":
        return name
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return "bfloat16" if _multiplies_bfloat16() and _bfloat16_is_faster() else "float32"


def _multiplies_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@functools.cache
def _bfloat16_is_faster() -> bool:
    """Instructions for it promise nothing: of two processors with AVX512-BF16, one ran at 171
    GFLOP/s where float32 had 312. Timed once a process, in turn."""
    pairs = [
        (torch.randn(512, 576).to(dtype), torch.randn(1536, 576).to(dtype))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    full, half = (
        min(times) for times in zip(*(map(_seconds, pairs) for _ in range(8)), strict=True)
    )
    return half < full


def _seconds(pair: tuple[torch.Tensor, torch.Tensor]) -> float:
    start = time.perf_counter()
    torch.nn.functional.linear(*pair)
    return time.perf_counter() - start

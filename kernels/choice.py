"""Which path runs: the Triton kernels or plain PyTorch. Nothing falls back on its own."""

import os

import torch

KERNELS = ("auto", "triton", "torch")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, which needs no card."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def has_matrix_units(device: torch.device) -> bool:
    """Whether Triton's `dot` uses them: from sm_80 up. On a T4 it would be plain arithmetic."""
    if device.type != "cuda":
        return interpreted()
    return torch.cuda.get_device_capability(device) >= (8, 0)


def use_triton(kernels: str, device: torch.device | str, dtype: torch.dtype) -> bool:
    """Settle `kernels`, one of auto, triton or torch; auto is triton on CUDA and torch elsewhere.

    Raises:
        ValueError: an unknown name, or kernels on a device or in a dtype that they do not support.
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels must be one of {KERNELS}, got {kernels!r}")
    device = torch.device(device)
    if kernels == "torch" or (kernels == "auto" and device.type != "cuda"):
        return False
    instead = "; kernels='torch' runs there"
    if device.type != "cuda" and not interpreted():
        raise ValueError(f"kernels='triton' needs a CUDA device, got {device}{instead}")
    if dtype not in DTYPES:
        raise ValueError(f"the Triton kernels take {DTYPES}, got {dtype}{instead}")
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        needed = (8, 0) if dtype == torch.bfloat16 else (7, 5)
        if capability < needed:
            raise ValueError(
                f"the Triton kernels need sm_{needed[0]}{needed[1]} for {dtype}, "
                f"{torch.cuda.get_device_name(device)} is sm_{capability[0]}{capability[1]}"
                f"{'; use float16' if dtype == torch.bfloat16 else instead}"
            )
    return True

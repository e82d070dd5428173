"""What only a card can show beside the kernels' own tests (`make test-gpu`)."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.packed import pack
from model.unimoer import ModelConfig, UniMoER
from tests.kernels.compare import error

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
TEXTS = [[5, 9, 13], [7], [8, 30, 31, 32, 33, 2]]


@pytest.mark.parametrize("kernels", ["triton", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_model_says_what_it_says_on_the_cpu(tiny_base, dtype: str, kernels: str) -> None:
    if dtype == "bfloat16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this card does not multiply bfloat16")
    found = []
    for device, name, path in (("cpu", "float64", "torch"), ("cuda", dtype, kernels)):
        model = UniMoER(ModelConfig(base=str(tiny_base), dtype=name), device, kernels=path)
        with torch.no_grad():
            found.append(model.embed(pack(TEXTS, device))[0].double().cpu())
    assert error(found[1], found[0]) <= (1e-5 if dtype == "float32" else 3e-2)


def test_a_seed_gives_the_same_start_on_the_card(tiny_base) -> None:
    starts = [UniMoER(ModelConfig(base=str(tiny_base)), device).trained() for device in
              ("cpu", "cuda")]  # fmt: skip
    for name, p in starts[0].items():
        assert torch.equal(p, starts[1][name].cpu()), name


PEAKS = """
import torch
from eval.machine import peak_bytes
from model.unimoer import ModelConfig, UniMoER

torch.zeros(1, device="cuda")  # what CUDA itself takes
UniMoER(ModelConfig(layers=1, dtype="float16"), "cuda")
before = peak_bytes("cpu")
model = UniMoER(ModelConfig(dtype="float32"), "cuda")
table = model.decoder.embed_tokens.weight
print(peak_bytes("cpu") - before, table.numel() * table.element_size())
"""


def test_the_weights_go_straight_to_the_card() -> None:
    """The default base, in a process whose peak is its own: host memory grows by its largest tensor
    at most, not by the model."""
    done = subprocess.run([sys.executable, "-c", PEAKS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown, table = map(int, done.stdout.split()[-2:])
    assert grown <= 1.5 * table

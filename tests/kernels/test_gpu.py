"""On a real card: the model and its ops against float64 on the CPU (`make test-gpu`).

A 16-bit result passes when its error is at most 1.5 times that of the plain formula of
`kernels.reference` on the same card at the same dtype, plus a floor.
"""

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.attention import attention
from kernels.moe_lora import bordered_linear, make_layout
from model.packed import pack
from model.unimoer import ModelConfig, UniMoER

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16]
FLOOR = 1e-4


def error(found: Tensor, truth: Tensor) -> float:
    """RMS of the difference over the RMS of the truth."""
    return ((found.double().cpu() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 7])
def test_attention(dtype: torch.dtype, window: int | None) -> None:
    torch.manual_seed(0)
    lengths = [1, 17, 17, 100]
    q, k, v = (torch.randn(sum(lengths), heads, 64, dtype=torch.float64) for heads in (4, 2, 2))

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        return torch.cat([reference.attention(a, b, c, True, window) for a, b, c in rows])

    truth = plain(q, k, v)
    q, k, v = (t.to("cuda", dtype) for t in (q, k, v))
    found = attention(q, k, v, [(1, 1), (2, 17), (1, 100)], causal=True, window=window)
    assert error(found, truth) <= 1.5 * error(plain(q, k, v), truth) + FLOOR


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 17, 513])
def test_bordered_linear(dtype: torch.dtype, tokens: int) -> None:
    torch.manual_seed(0)
    d, out, rank = 128, 192, 48
    x, weight = torch.randn(tokens, d).double(), torch.randn(out, d).double() * d**-0.5
    a, b = torch.randn(rank, d).double() * d**-0.5, torch.randn(out, rank).double() * 0.1
    gates = torch.rand(tokens, 3).double()
    experts = [(a[i : i + 16], b[:, i : i + 16]) for i in (0, 16, 32)]
    truth = reference.moe_lora(x, weight, gates, experts, [2.0] * 3)
    x, weight, card_gates = (t.to("cuda", dtype) for t in (x, weight, gates))
    halves = [(left.to("cuda", dtype), right.to("cuda", dtype)) for left, right in experts]
    plain = reference.moe_lora(x, weight, card_gates, halves, [2.0] * 3)
    layout = make_layout(d, [out], [True], rank, pad=16)
    bordered = torch.zeros(layout.shape, device="cuda", dtype=dtype)
    bordered[:out, :d], bordered[out : out + rank, :d] = weight, a.to("cuda", dtype)
    bordered[:out, d : d + rank] = b.to("cuda", dtype)
    wide = (2 * gates.repeat_interleave(16, 1)).float().cuda()
    masters = [a.float().cuda(), b.float().cuda()]
    (found,) = bordered_linear(layout, bordered, x, wide, masters)
    assert error(found, truth) <= 1.5 * error(plain, truth) + FLOOR


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_model_says_what_it_says_on_the_cpu(tiny_base, dtype: str) -> None:
    texts = [[5, 9, 13], [7], [8, 30, 31, 32, 33, 2]]
    found = []
    for device, name in (("cpu", "float64"), ("cuda", dtype)):
        model = UniMoER(ModelConfig(base=str(tiny_base), dtype=name), device)
        with torch.no_grad():
            found.append(model.embed(pack(texts, device))[0].double().cpu())
    assert error(found[1], found[0]) <= (1e-5 if dtype == "float32" else 3e-2)

"""Each kernel, forward and backward, against its plain twin; on a card with `make test-gpu`."""

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.add_rmsnorm_pool import add_rmsnorm_pool
from kernels.attention import attention, packed_attention, padded_attention
from kernels.qk_norm_rope import qk_norm_rope
from kernels.route import route
from kernels.segments import CHUNK, Segments, buckets, sum_chunks
from kernels.sparsegen import fused_sparsegen
from kernels.swiglu import swiglu
from tests.kernels.compare import Inputs, check, draw, places, texts, undefined_memory_is_nan

undefined = pytest.fixture(autouse=True)(undefined_memory_is_nan)


def behind(x: Tensor, columns: int) -> Tensor:
    """x with columns of NaN behind it: what an op is told not to read."""
    return torch.cat((x, x.new_full((len(x), columns), torch.nan)), 1)


@texts
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_segments(sizes: tuple[int, ...], device: str) -> None:
    segments = Segments.of(sizes, device)
    chunks = segments.chunks.tolist()
    tokens = [(t, text) for start, end, text in chunks for t in range(start, end)]
    assert tokens == list(enumerate(segments.index.tolist()))
    assert all(0 < end - start <= CHUNK for start, end, _ in chunks)
    values = torch.arange(float(len(chunks) * 3), device=device).view(-1, 3)
    sums = sum_chunks(values, segments, mean=False)
    for text, row in enumerate(sums):
        own = [i for i, chunk in enumerate(chunks) if chunk[2] == text]
        assert torch.equal(row, values[own].sum(0))
    means = sum_chunks(values, segments, mean=True)  # a card divides to two units in the last place
    torch.testing.assert_close(means, sums / segments.lengths[:, None].float(), rtol=3e-7, atol=0)


@places
@texts
def test_swiglu(sizes, device, dtype) -> None:
    width = 1048  # a block of columns and part of another
    inputs = Inputs(gate_up=draw(sum(sizes), 2 * width))
    check(
        lambda v: [swiglu(behind(v["gate_up"], 16), width, 24)[:, :width]],
        lambda v: [reference.swiglu(*v["gate_up"].split(width, 1))],
        inputs,
        device,
        dtype,
    )


@places
@texts
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
def test_qk_norm_rope(sizes, device, dtype, norm: bool) -> None:
    h, g, k = 3, 1, 24  # a head size that is no power of two, as many heads as no tile has
    angle = draw(sum(sizes), k // 2, seed=1)
    inputs = Inputs(qkv=draw(sum(sizes), (h + 2 * g) * k), cos=angle.cos(), sin=angle.sin())
    inputs.keep_wide("cos", "sin").freeze("cos", "sin")
    if norm:
        inputs.tensors |= {"q": 1 + draw(k, seed=2), "k": 1 + draw(k, seed=3)}
        inputs.freeze("q", "k")

    def plain(v):
        turn = [v[name].to(v["qkv"].dtype) for name in ("cos", "sin")]
        norms = (v.get("q"), v.get("k"))
        return list(reference.qk_norm_rope(v["qkv"], turn[0], turn[1], *norms, 1e-5, h, g, k))

    def fused(v):
        turn, norms = (v["cos"], v["sin"]), (v.get("q"), v.get("k"))
        return list(qk_norm_rope(behind(v["qkv"], 16), *turn, *norms, 1e-5, h, g, k))

    check(fused, plain, inputs, device, dtype)


@places
@texts
@pytest.mark.parametrize("add", [True, False], ids=["add", "first"])
def test_add_rmsnorm_pool(sizes, device, dtype, add: bool) -> None:
    d, segments = 40, Segments.of(sizes, device)
    inputs = Inputs(x=draw(sum(sizes), d), weight=1 + draw(d, seed=1)).freeze("weight")
    if add:
        inputs.tensors["delta"] = draw(sum(sizes), d, seed=2)

    def fused(v):
        delta = behind(v["delta"], 8) if add else None
        h, normed, pooled = add_rmsnorm_pool(
            v["x"], delta, v["weight"], 1e-5, segments, 32, 16, pooled=True
        )
        assert pooled is not None and normed.shape[1] == 32 + d + 16
        return [h * 2, normed[:, 32 : 32 + d], pooled]

    def plain(v):
        h, *rest = reference.add_rmsnorm_pool(v["x"], v.get("delta"), v["weight"], 1e-5, sizes)
        return [h * 2, *rest]

    check(fused, plain, inputs, device, dtype)


@pytest.mark.parametrize("layout", ["transposed", "expanded"])
def test_gradients_of_any_layout(layout: str) -> None:
    """What comes back from the next op may be a view: a transposed one, or one number of a sum."""
    sizes, d, h, g, k = (3, 1, 2), 24, 3, 1, 8
    segments, n, angle = Segments.of(sizes, "cpu"), sum(sizes), draw(sum(sizes), 4, seed=1).float()
    x, delta, gate_up, qkv = (
        draw(n, width, seed=i).float().requires_grad_()
        for i, width in enumerate((d, d, 2 * d, (h + 2 * g) * k))
    )
    weight, turn = draw(d, seed=4).float(), (angle.cos(), angle.sin(), None, None)
    runs = [
        ([x, delta], lambda: add_rmsnorm_pool(x, delta, weight, 1e-5, segments, pooled=True),
         lambda: reference.add_rmsnorm_pool(x, delta, weight, 1e-5, sizes)),
        ([gate_up], lambda: [swiglu(gate_up, d, 0)],
         lambda: [reference.swiglu(*gate_up.split(d, 1))]),
        ([qkv], lambda: qk_norm_rope(qkv, *turn, 1e-5, h, g, k),
         lambda: reference.qk_norm_rope(qkv, *turn, 1e-5, h, g, k)),
    ]  # fmt: skip

    def back(y: Tensor) -> Tensor:
        if layout == "expanded":
            return torch.ones(()).expand(y.shape)
        return draw(*reversed(y.shape), seed=5).float().permute(*reversed(range(y.ndim)))

    for inputs, fused, plain in runs:
        found, expected = ([y for y in run() if y is not None] for run in (fused, plain))
        for a, b in zip(
            torch.autograd.grad(found, inputs, [back(y) for y in found]),
            torch.autograd.grad(expected, inputs, [back(y) for y in expected]),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_add_rmsnorm_pool_of_strided_rows() -> None:
    segments = Segments.of((3, 2), "cpu")
    x, delta, weight = draw(5, 80).float()[:, ::2], draw(40, 5, seed=1).float().t(), torch.ones(40)
    h, normed, _ = add_rmsnorm_pool(x, delta, weight, 1e-5, segments)
    assert torch.equal(h, x + delta)
    torch.testing.assert_close(normed, reference.rms_norm(x + delta, weight, 1e-5))


@places
@texts
@pytest.mark.parametrize("experts", [1, 3, 5])
def test_route(sizes, device, dtype, experts: int) -> None:
    d, hidden, rows = 72, 12, sum(sizes)
    inputs = Inputs(
        x=draw(rows, d),
        up=draw(hidden, d, seed=1) * d**-0.5,
        up_bias=draw(hidden, seed=2),
        down=draw(experts, hidden, seed=3) * hidden**-0.5,
        down_bias=draw(experts, seed=4) * 0.1,
        c=torch.tensor(0.8, dtype=torch.float64),
        offset=draw(rows, experts, seed=5) * 0.1,
    ).keep_wide("up", "up_bias", "down", "down_bias", "c", "offset")
    names = list(inputs.tensors)

    def plain(v):
        x, *rest = (v[name] for name in names)
        return [reference.route(x if x.dtype == torch.float64 else x.float(), *rest)]

    check(lambda v: [route(*(v[name] for name in names))], plain, inputs, device, dtype)


@pytest.mark.parametrize("experts", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("c", [0.1, 0.8, 5.0])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_sparsegen(experts: int, c: float, device: str) -> None:
    """One-hot, in between and dense; ties; a lambda for each row and one for all."""
    u = draw(100, experts)
    u[:20] = u[:20, :1]  # all alike
    for shape in ((), (100, 1)):
        inputs = Inputs(u=u, c=torch.full(shape, c, dtype=torch.float64))
        check(
            lambda v: [fused_sparsegen(v["u"], v["c"])],
            lambda v: [reference.sparsegen(v["u"], v["c"])],
            inputs,
            device,
            torch.float32,
        )
    found = fused_sparsegen(u.float().to(device), torch.tensor(c, device=device))
    assert ((found.sum(1) - 1).abs() < 1e-6).all() and (found >= 0).all()
    assert fused_sparsegen(u[:0].float().to(device), torch.tensor(c, device=device)).numel() == 0
    with pytest.raises(ValueError, match="float32"):
        fused_sparsegen(u.half().to(device), torch.tensor(c, device=device))


@places
@texts
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both"])
@pytest.mark.parametrize("window", [None, 7])
def test_packed_attention(sizes, device, dtype, causal: bool, window: int | None) -> None:
    n, segments = sum(sizes), Segments.of(sizes, device)
    inputs = Inputs(q=draw(n, 4, 16), k=draw(n, 2, 16, seed=1), v=draw(n, 2, 16, seed=2))

    def plain(v):
        parts = zip(*(v[name].split(sizes) for name in "qkv"), strict=True)
        rows = [reference.attention(q, k, w, causal, window) for q, k, w in parts]
        return [torch.cat(rows) if rows else v["q"] * 1]

    def fused(v):
        return [packed_attention(v["q"], v["k"], v["v"], segments, causal=causal, window=window)]

    check(fused, plain, inputs, device, dtype)


def test_padded_attention_is_the_grouped_one() -> None:
    sizes = (1, 3, 3, 4, 9, 2)
    q, k, v = (draw(sum(sizes), heads, 8, seed=heads) for heads in (4, 2, 2))
    groups = [(1, 1), (2, 3), (1, 4), (1, 9), (1, 2)]
    for causal in (True, False):
        found = padded_attention(q, k, v, Segments.of(sizes, "cpu"), causal=causal)
        torch.testing.assert_close(found, attention(q, k, v, groups, causal=causal))


def test_buckets_waste_little_and_keep_the_order() -> None:
    sizes = tuple(sorted(int(n) for n in torch.randint(1, 200, (300,))))
    runs = buckets(sizes)
    assert sum(count for count, _ in runs) == len(sizes) and len(runs) < 30
    at = 0
    for count, longest in runs:
        assert max(sizes[at : at + count]) == longest
        assert count * longest <= 1.25 * sum(sizes[at : at + count])
        at += count

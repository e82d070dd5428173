"""The fused MoE-LoRA linear, forward and backward, against `reference.moe_lora`."""

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.bordered import Routing, fused_linear, routed_linear
from kernels.dropout import dropout_mask
from kernels.moe_lora import Pieces, make_layout
from kernels.segments import Segments
from kernels.shrink import ALL, TEXT, TOKEN, Columns, Group
from tests.kernels.compare import (
    PLACES,
    Inputs,
    check,
    draw,
    error,
    places,
    results,
    texts,
    undefined_memory_is_nan,
)

undefined = pytest.fixture(autouse=True)(undefined_memory_is_nan)
D, OUTS, RANKS, SCALES = 40, (24, 8, 16), (4, 3, 9), (2.0, 0.5, 1.0)
RANK = sum(RANKS)
units = pytest.mark.parametrize("matrix_units", [True, False], ids=["dot", "cublas"])


def group(v: dict[str, Tensor], adapted: tuple[bool, ...], matrix_units: bool) -> Group:
    """M from W, and from A and B of the adapted linears; the padding is zero."""
    w = v["w"]
    layout = make_layout(D, list(OUTS[: len(adapted)]), list(adapted), RANK, pad=16)
    m = torch.zeros(layout.shape, device=w.device, dtype=w.dtype)
    m[: layout.out_features, layout.x] = w.detach()
    for i, linear in enumerate(layout.adapted):
        a, b = (v[f"{name}{i}"].detach().to(m.dtype) for name in "ab")
        m[linear.rank_rows.start : linear.rank_rows.start + RANK, layout.x] = a
        m[linear.rows, linear.spare.start : linear.spare.start + RANK] = b
    owner = torch.full((len(layout.adapted), layout.padded), -1, dtype=torch.int32)
    scale = torch.zeros(owner.shape)
    owner[:, :RANK] = torch.arange(3, dtype=torch.int32).repeat_interleave(torch.tensor(RANKS))
    scale[:, :RANK] = torch.tensor(SCALES).repeat_interleave(torch.tensor(RANKS))
    columns = Columns(owner.flatten().to(w.device), scale.flatten().to(w.device))
    return Group(layout, m, Pieces.of(layout, m), columns, matrix_units)


def inputs_of(rows: int, adapted: tuple[bool, ...]) -> Inputs:
    outs = OUTS[: len(adapted)]
    made = Inputs(x=draw(rows, D), w=draw(sum(outs), D, seed=1) * D**-0.5).freeze("w")
    for i, out in enumerate(out for out, has in zip(outs, adapted, strict=True) if has):
        made.tensors[f"a{i}"] = draw(RANK, D, seed=10 + i) * D**-0.5
        made.tensors[f"b{i}"] = draw(out, RANK, seed=20 + i) * 0.3
    return made


def masters(v: dict[str, Tensor], adapted: tuple[bool, ...]) -> list[Tensor]:
    return [v[f"{name}{i}"] for i in range(sum(adapted)) for name in "ab"]


def plain(v: dict[str, Tensor], gates: Tensor, adapted: tuple[bool, ...]) -> Tensor:
    """All linears side by side, by the definition; gates (N, 3)."""
    outputs, i, dtype = [], 0, v["x"].dtype
    for w, has in zip(v["w"].split(OUTS[: len(adapted)]), adapted, strict=True):
        if has:
            a, b = v[f"a{i}"].to(dtype), v[f"b{i}"].to(dtype)
            experts = list(zip(a.split(RANKS), b.split(RANKS, 1), strict=True))
            y = reference.moe_lora(v["x"], w, gates.to(dtype), experts, list(SCALES))
            i += 1
        else:
            y = v["x"] @ w.t()
        outputs.append(y)
    return torch.cat(outputs, 1)


GATES = {
    "dense": lambda n: draw(n, 3, seed=5).softmax(1),
    "one-hot": lambda n: torch.eye(3, dtype=torch.float64)[torch.arange(n) % 3],
    "uniform": lambda n: torch.full((n, 3), 1 / 3, dtype=torch.float64),
}
GROUPS = {
    "qkv": (True, True, True),
    "some": (True, False, True),
    "right": (False, True),
    "o": (True,),
}


@places
@texts
@units
@pytest.mark.parametrize("kind", GATES)
def test_weights_of_texts(sizes, device, dtype, matrix_units: bool, kind: str) -> None:
    adapted, segments = GROUPS["qkv"], Segments.of(sizes, device)
    inputs = inputs_of(sum(sizes), adapted)
    inputs.tensors["weights"] = GATES[kind](len(sizes))
    inputs.keep_wide("weights", "a0", "b0", "a1", "b1", "a2", "b2")
    out = sum(OUTS)

    def fused(v):
        made = group(v, adapted, matrix_units)
        y = fused_linear(made, v["x"], v["weights"], segments, masters(v, adapted), TEXT)
        return [y[:, :out]]

    check(
        fused,
        lambda v: [plain(v, v["weights"][segments.index.to(v["x"].device).long()], adapted)],
        inputs,
        device,
        dtype,
    )


@places
@units
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("mode", [ALL, TOKEN], ids=["all", "token"])
@pytest.mark.parametrize("wide", [True, False], ids=["wide", "narrow"])
def test_every_group(device, dtype, matrix_units: bool, name: str, mode: int, wide: bool) -> None:
    """Wide inputs keep x between the spare columns, so x and its gradient are never copied."""
    sizes = (1, 16, 4)
    adapted, segments, n = GROUPS[name], Segments.of(sizes, device), sum(sizes)
    inputs = inputs_of(n, adapted)
    if mode == TOKEN:
        inputs.tensors["weights"] = GATES["dense"](n)
        inputs.keep_wide("weights")

    def fused(v):
        made = group(v, adapted, matrix_units)
        x, layout = v["x"], made.layout
        if wide:
            left, right = layout.x.start, layout.shape[1] - layout.x.stop
            margins = [x.new_full((n, width), torch.nan) for width in (left, right)]
            x = torch.cat((margins[0], x, margins[1]), 1)
        y = fused_linear(made, x, v.get("weights"), segments, masters(v, adapted), mode)
        return [y[:, : layout.out_features]]

    ones = torch.ones(n, 3, dtype=torch.float64)
    check(
        fused,
        lambda v: [plain(v, v.get("weights", ones.to(v["x"].device)), adapted)],
        inputs,
        device,
        dtype,
    )


@places
@texts
@units
def test_tokens_that_route_themselves(sizes, device, dtype, matrix_units: bool) -> None:
    adapted, segments = GROUPS["qkv"], Segments.of(sizes, device)
    inputs = inputs_of(sum(sizes), adapted)
    hidden = 12
    inputs.tensors |= {
        "up": draw(hidden, D, seed=31) * D**-0.5,
        "up_bias": draw(hidden, seed=32),
        "down": draw(3, hidden, seed=33) * hidden**-0.5,
        "down_bias": draw(3, seed=34) * 0.1,
        "c": torch.tensor(0.8, dtype=torch.float64),
        "offset": draw(sum(sizes), 3, seed=35) * 0.1,
    }
    router = ("up", "up_bias", "down", "down_bias", "c", "offset")
    inputs.keep_wide(*router)
    out = sum(OUTS)

    def fused(v):
        made = group(v, adapted, matrix_units)
        mlp = tuple(v[name] for name in router[:4])
        routing = Routing(mlp, v["c"], v["offset"])
        y, weights = routed_linear(made, v["x"], routing, segments, masters(v, adapted))
        return [y[:, :out], weights]

    def own(v):
        x = v["x"] if v["x"].dtype == torch.float64 else v["x"].float()
        weights = reference.route(x, *(v[name] for name in router))
        return [plain(v, weights, adapted), weights]

    check(fused, own, inputs, device, dtype)


@units
@pytest.mark.parametrize("wide", [True, False], ids=["wide", "narrow"])
def test_strided_inputs(matrix_units: bool, wide: bool) -> None:
    """Columns apart, as a transposed tensor has them."""
    adapted, segments = GROUPS["qkv"], Segments.of((3, 20), "cpu")
    v = inputs_of(23, adapted).cast("cpu", torch.float32)
    made = group(v, adapted, matrix_units)
    x = v["x"].detach()
    if wide:
        margins = (made.layout.x.start, made.layout.shape[1] - made.layout.x.stop)
        x = torch.nn.functional.pad(x, margins)
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.0, 0.0, 1.0]])
    ways = (x.clone(), x.t().contiguous().t(), x.repeat_interleave(2, 0)[::2])
    assert [way.stride(1) for way in ways] == [1, 23, 1]
    found = [
        fused_linear(made, way, weights, segments, masters(v, adapted), TEXT)[:, : sum(OUTS)]
        for way in ways
    ]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@units
def test_dropout(device, dtype, matrix_units: bool) -> None:
    """The mask that the experts' input meets, forward and backward; the base sees all of x."""
    sizes, adapted = (1, 40), GROUPS["o"]
    segments = Segments.of(sizes, device)
    v = inputs_of(41, adapted).cast(device, dtype)
    keep = dropout_mask(torch.arange(41, device=device), D, 0.4, dtype)
    own = dict(v, x=v["x"].detach().clone().requires_grad_())
    base = own["x"] @ v["w"][: OUTS[0]].t()
    dropped = dict(own, x=own["x"] * keep, w=torch.zeros_like(v["w"][: OUTS[0]]))
    ones = torch.ones(41, 3, device=device)
    expected = base + plain(dropped, ones, adapted)
    made = group({**v, "w": v["w"][: OUTS[0]]}, adapted, matrix_units)
    y = fused_linear(made, v["x"], None, segments, masters(v, adapted), ALL, keep)
    found = y[:, : OUTS[0]]
    g = draw(41, OUTS[0]).to(device, dtype)
    names = ("x", "a0", "b0")
    first = torch.autograd.grad((found * g).sum(), [v[name] for name in names])
    second = torch.autograd.grad((expected * g).sum(), [own[name] for name in names])
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip((found, *first), (expected, *second), strict=True):
        assert error(a, b.detach().double().cpu()) < limit


@places
def test_the_same_bits_on_every_run(device, dtype) -> None:
    sizes, adapted = (1, 17, 395, 100), GROUPS["qkv"]
    segments = Segments.of(sizes, device)
    inputs = inputs_of(sum(sizes), adapted)
    inputs.tensors["weights"] = GATES["dense"](len(sizes))
    inputs.keep_wide("weights")
    values = inputs.cast(device, dtype)

    def run(v):
        made = group(v, adapted, True)
        return [
            fused_linear(made, v["x"], v["weights"], segments, masters(v, adapted), TEXT)[:, :48]
        ]

    once, again = results(run, values), results(run, values)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_an_expert_without_weight_changes_nothing() -> None:
    """Weight 0 is exact: whatever the expert holds, short of infinities, the bits stay the same."""
    sizes, adapted = (3, 20), GROUPS["qkv"]
    segments = Segments.of(sizes, "cpu")
    v = inputs_of(23, adapted).cast("cpu", torch.float32)
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.3, 0.7, 0.0]])
    found = []
    for factor in (1.0, 1e6):
        for i in range(3):
            with torch.no_grad():
                v[f"a{i}"][-RANKS[2] :] *= factor
        made = group(v, adapted, True)
        found.append(fused_linear(made, v["x"], weights, segments, masters(v, adapted), TEXT))
    assert torch.equal(found[0][:, : sum(OUTS)], found[1][:, : sum(OUTS)])


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", torch.float16), *(p for p in PLACES if p.id in ("card-fp16", "card-bf16"))],
)
def test_one_gemm_rounds_no_worse_than_addmm(device, dtype) -> None:
    """x W' rounded to 16 bit and then added to, against one accumulator for both."""
    adapted, segments = GROUPS["qkv"], Segments.of((1, 399), device)
    inputs = inputs_of(400, adapted)
    gates = GATES["dense"](400)
    truth = plain(inputs.cast("cpu", torch.float64), gates, adapted).detach()
    v = inputs.cast(device, dtype)
    made = group(v, adapted, True)
    weights = gates.float().to(device)
    y = fused_linear(made, v["x"], weights, segments, masters(v, adapted), TOKEN)[:, : sum(OUTS)]
    wide = weights.repeat_interleave(torch.tensor(RANKS, device=device), 1)
    wide = wide * torch.tensor(SCALES, device=device).repeat_interleave(
        torch.tensor(RANKS, device=device)
    )
    parts = []
    for i, w in enumerate(v["w"].split(OUTS)):
        s = (wide * (v["x"] @ v[f"a{i}"].t())).to(dtype)
        parts.append(torch.addmm(v["x"] @ w.t(), s, v[f"b{i}"].t()))
    assert error(y, truth) <= 1.02 * error(torch.cat(parts, 1), truth)

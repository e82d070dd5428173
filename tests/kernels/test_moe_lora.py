"""The bordered MoE-LoRA linear against y = W x + sum_i w_i s_i B_i A_i x, written out."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.dropout import dropout_mask
from kernels.moe_lora import Layout, bordered_linear, make_layout

RANKS, SCALES = (5, 3, 17), (2.0, 0.5, 1.0)
RANK = sum(RANKS)
# (output sizes, which have experts): one, two and three linears of one input
GROUPS = {
    "one": ((13,), (True,)),
    "two": ((13, 7), (True, True)),
    "three": ((13, 7, 7), (True, True, True)),
    "second of two": ((13, 7), (False, True)),
    "first of three": ((13, 7, 7), (True, False, False)),
    "first and last": ((13, 7, 9), (True, False, True)),
}


@dataclass
class Case:
    """One group with everything that bordered_linear takes; `gates` are the expert weights."""

    layout: Layout
    weights: list[Tensor]
    masters: list[Tensor]
    x: Tensor
    gates: Tensor

    def bordered(self) -> Tensor:
        """M, laid out as its docstring says, from W and the masters."""
        m = torch.zeros(self.layout.shape, dtype=self.x.dtype)
        for linear, weight in zip(self.layout.linears, self.weights, strict=True):
            m[linear.rows, self.layout.x] = weight
        pairs = zip(self.masters[::2], self.masters[1::2], strict=True)
        for linear, (a, b) in zip(self.layout.adapted, pairs, strict=True):
            m[linear.rank_rows.start : linear.rank_rows.start + RANK, self.layout.x] = a.to(m)
            m[linear.rows, linear.spare.start : linear.spare.start + RANK] = b.to(m)
        return m

    def inputs(self) -> list[Tensor]:
        return [self.x, self.gates, *self.masters]

    def by_rank(
        self, x: Tensor, gates: Tensor, *masters: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        """(N, all outputs) of bordered_linear; `gates` are w_i s_i repeated over the ranks."""
        outputs = bordered_linear(self.layout, self.bordered(), x, gates, list(masters), keep)
        return torch.cat(outputs, 1)

    def fast(
        self, x: Tensor, gates: Tensor, *masters: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        return self.by_rank(x, repeated(gates), *masters, keep=keep)

    def plain(self, x: Tensor, gates: Tensor, *masters: Tensor) -> Tensor:
        """The same from kernels.reference at the dtype of x, one linear after the other."""
        gates = gates.to(x.dtype).expand(len(x), -1)
        pairs = iter(zip(masters[::2], masters[1::2], strict=True))
        outputs = []
        for linear, weight in zip(self.layout.linears, self.weights, strict=True):
            experts = []
            if linear in self.layout.adapted:
                a, b = (t.to(x.dtype) for t in next(pairs))
                experts = list(zip(a.split(RANKS), b.split(RANKS, 1), strict=True))
            scales = list(SCALES)[: len(experts)]
            outputs.append(reference.moe_lora(x, weight, gates, experts, scales))
        return torch.cat(outputs, 1)


def repeated(gates: Tensor) -> Tensor:
    """w_i (N, E) -> w_i s_i, repeated over the ranks (N, R)."""
    return (gates * torch.tensor(SCALES)).repeat_interleave(torch.tensor(RANKS), 1)


def make_case(
    group: str,
    rows: int | None = None,
    dtype: torch.dtype = torch.float64,
    tokens: int = 11,
    features: int = 10,
    widen: int = 1,
) -> Case:
    """`rows` of gates: 1, or one for each token (None). Random values, B not zero."""
    outs, adapted = GROUPS[group]
    outs = tuple(out * widen for out in outs)
    layout = make_layout(features, list(outs), list(adapted), RANK, pad=16)
    generator = torch.Generator().manual_seed(0)
    master = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = [normal(out, features, scale=features**-0.5).to(dtype) for out in outs]
    masters = []
    for out, has in zip(outs, adapted, strict=True):
        if has:
            masters.append(normal(RANK, features, scale=features**-0.5).to(master))
            masters.append(normal(out, RANK, scale=RANK**-0.5).to(master))
    gates = torch.rand(rows or tokens, len(RANKS), generator=generator).to(master)
    return Case(layout, weights, masters, normal(tokens, features).to(dtype), gates)


def normal_like_output(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(len(case.x), case.layout.out_features, generator=generator).to(case.x.dtype)


def results(
    function: Callable[..., Tensor], inputs: list[Tensor], weight: Tensor
) -> dict[str, Tensor]:
    """The output, and the gradient of <output, weight> with respect to every input."""
    inputs = [t.clone().requires_grad_() for t in inputs]
    y = function(*inputs)
    grads = torch.autograd.grad(y, inputs, weight.to(y.dtype))
    names = ["x", "gates"] + [f"{ab}{i}" for i in range(3) for ab in "AB"]
    found = {"y": y.detach(), **dict(zip(names, grads, strict=False))}
    for tensor, grad in zip(inputs, grads, strict=True):
        assert grad.dtype == tensor.dtype and grad.shape == tensor.shape
    return found


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("rows", [None, 1])
def test_equals_the_reference(group: str, rows: int | None) -> None:
    case = make_case(group, rows)
    weight = normal_like_output(case)
    found, expected = (results(f, case.inputs(), weight) for f in (case.fast, case.plain))
    assert found.keys() == expected.keys() and len(found) == 3 + 2 * len(case.layout.adapted)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("rows", [None, 1])
def test_gradcheck(group: str, rows: int | None) -> None:
    case = make_case(group, rows, tokens=3, features=4)
    case.gates = repeated(case.gates)  # a gate for each rank has a gradient of its own
    inputs = [t.requires_grad_() for t in case.inputs()]
    assert torch.autograd.gradcheck(case.by_rank, inputs, fast_mode=True)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    """Below the first layer x needs none, and fixed gates need none."""
    case = make_case("three")
    masters = [t.requires_grad_() for t in case.masters]
    case.fast(case.x, case.gates, *masters).square().sum().backward()
    assert case.x.grad is None and case.gates.grad is None
    assert all(t.grad is not None and t.grad.abs().max() > 0 for t in masters)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("rows", [None, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounds_no_worse_than_the_plain_formula(
    group: str, rows: int | None, dtype: torch.dtype
) -> None:
    """RMS error against float64 at most 1.5 times plain PyTorch's own, plus a floor."""
    case = make_case(group, rows, dtype, tokens=57, features=252, widen=23)
    weight = normal_like_output(case)
    found, plain = (results(f, case.inputs(), weight) for f in (case.fast, case.plain))
    case.weights = [t.double() for t in case.weights]
    truth = results(case.plain, [t.double() for t in case.inputs()], weight)
    if rows == 1:
        del truth["gates"]  # three numbers: their RMS error is luck

    # bf16: what rounding the exact result once costs. fp32 also adds up in fp32, and there a GEMM's
    # order of summation is a little worse than the pairwise sums that plain PyTorch may use.
    units = 0.25 if dtype == torch.bfloat16 else 1.0

    def rms(t: Tensor) -> float:
        return t.double().square().mean().sqrt().item()

    for name, expected in truth.items():
        floor = units * torch.finfo(dtype).eps * rms(expected)
        error, bound = rms(found[name] - expected), 1.5 * rms(plain[name] - expected) + floor
        assert error <= bound, f"{name}: RMS error {error:.2e}, bound {bound:.2e}"


@pytest.mark.parametrize("group", GROUPS)
def test_b_of_zero_adds_exactly_nothing(group: str) -> None:
    """In small integers every order of summation is exact, so the base comes out bit for bit."""
    case = make_case(group, dtype=torch.float32, tokens=40, features=576)
    case.x = (3 * case.x).round()
    case.weights = [(100 * t).round() for t in case.weights]
    for b in case.masters[1::2]:
        b.zero_()
    expected = torch.cat([case.x @ w.t() for w in case.weights], 1)
    assert expected.abs().max() < 2**24 and expected.abs().max() > 100
    assert torch.equal(case.fast(case.x, case.gates, *case.masters), expected)


@pytest.mark.parametrize("pad", [1, 16, 64])
@pytest.mark.parametrize("group", GROUPS)
def test_layout_windows(group: str, pad: int) -> None:
    """Each linear is in one window, which covers x and its own spare block and no other's W."""
    outs, adapted = GROUPS[group]
    layout = make_layout(10, list(outs), list(adapted), RANK, pad)
    assert layout.out_features == sum(outs)
    assert [linear.rows.stop - linear.rows.start for linear in layout.linears] == list(outs)
    taken = [layout.x] + [linear.spare for linear in layout.adapted]
    columns = sorted(i for part in taken for i in range(part.start, part.stop))
    assert columns == list(range(layout.shape[1])), "every column belongs to x or to one block"
    for linear in layout.linears:
        (window,) = [w for w in layout.windows if w.rows.start <= linear.rows.start < w.rows.stop]
        assert linear.rows.stop <= window.rows.stop
        assert window.cols.start <= layout.x.start and layout.x.stop <= window.cols.stop
        if linear in layout.adapted:
            assert (linear.spare.stop - linear.spare.start) % pad == 0
            assert window.cols.start <= linear.spare.start
            assert linear.spare.stop <= window.cols.stop


# Dropout -------------------------------------------------------------------------------------


def mask_for(case: Case, p: float) -> Tensor:
    return dropout_mask(torch.arange(len(case.x)), case.x.shape[1], p, case.x.dtype)


@pytest.mark.parametrize("group", ["one", "three"])
def test_dropout_uses_one_mask_forward_and_backward(group: str) -> None:
    """It is the explicit formula with that mask: only the way to A is dropped."""
    case = make_case(group)
    keep = mask_for(case, 0.4)

    def explicit(x: Tensor, gates: Tensor, *masters: Tensor) -> Tensor:
        bare = torch.cat([x @ w.t() for w in case.weights], 1)
        dropped = case.plain(x * keep, gates, *masters)
        return bare + dropped - torch.cat([(x * keep) @ w.t() for w in case.weights], 1)

    def dropped(*inputs: Tensor) -> Tensor:
        return case.fast(*inputs, keep=keep)

    weight = normal_like_output(case)
    found, expected = (results(f, case.inputs(), weight) for f in (dropped, explicit))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


def test_dropout_keeps_the_mean() -> None:
    case = make_case("one")
    torch.manual_seed(0)
    with torch.no_grad():
        draws = torch.stack(
            [case.fast(*case.inputs(), keep=mask_for(case, 0.5)) for _ in range(2000)]
        )
        expected = case.fast(*case.inputs())
    error = draws.std(0) / 2000**0.5
    assert error.min() > 0
    assert ((draws.mean(0) - expected).abs() < 5 * error).all()


def test_dropout_in_bfloat16_scales_what_it_keeps() -> None:
    """1 / (1 - 0.1) is not representable; the mean may be off by its rounding, not by more."""
    case = make_case("one", dtype=torch.bfloat16, tokens=4000)
    case.x = torch.ones_like(case.x)
    a, b = case.masters
    torch.manual_seed(0)
    with torch.no_grad():
        delta = case.fast(case.x, case.gates, a, b, keep=mask_for(case, 0.1))
        delta = delta - case.x @ case.weights[0].t()
        whole = case.fast(case.x, case.gates, a, b) - case.x @ case.weights[0].t()
    torch.testing.assert_close(delta.float().mean(0), whole.float().mean(0), rtol=0.03, atol=0.02)


def test_one_gemm_rounds_no_worse_than_addmm() -> None:
    """bfloat16: x W' rounded and then added to, against one accumulator for both."""
    generator = torch.Generator().manual_seed(0)
    x, w, a, b = (
        torch.randn(*shape, generator=generator) * scale
        for shape, scale in (((400, 256), 1), ((192, 256), 1 / 16), ((48, 256), 1 / 16),
                             ((192, 48), 0.1))
    )  # fmt: skip
    x, w, a, b = (t.bfloat16() for t in (x, w, a, b))
    gates = torch.rand(400, 48, generator=generator)
    exact = x.double() @ w.double().t()
    exact += (gates.double() * (x.double() @ a.double().t())) @ b.double().t()
    layout = make_layout(256, [192], [True], 48, pad=16)
    m = torch.zeros(layout.shape, dtype=torch.bfloat16)
    m[:192, :256], m[192:, :256], m[:192, 256:] = w, a, b
    (ours,) = bordered_linear(layout, m, x, gates, [a.float(), b.float()])
    gated = (gates * (x @ a.t())).bfloat16()
    theirs = torch.addmm(x @ w.t(), gated, b.t())
    ours, theirs = ((y.double() - exact).norm() for y in (ours, theirs))
    assert ours <= 1.02 * theirs

"""Each kernel against its plain twin, `torch.compile` of the twin, and the limit of the machine.

The limit of a kernel that moves memory is a copy of the bytes it must read and write, timed on the
same machine; that of a matrix product is the base's own GEMM. One layer's worth of work each, in
the real shape; forward, and forward with backward.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench import timing
from bench.designs import ConcatGroup, lengths, lora_config, randomise
from kernels import elementwise, reference
from kernels.add_rmsnorm_pool import add_rmsnorm_pool
from kernels.attention import packed_attention, padded_attention
from kernels.info_nce import info_nce
from kernels.qk_norm_rope import qk_norm_rope
from kernels.route import route
from kernels.segments import Segments
from kernels.shrink import TEXT
from kernels.sparsegen import fused_sparsegen
from kernels.swiglu import swiglu
from model.config import DTYPES, DecoderConfig
from model.lora import LinearGroup


@dataclass
class Case:
    """One op: ours and its twin on the same inputs, and the bytes that any version must move.

    limit: what else bounds it, timed instead of a copy of `bytes`.
    """

    name: str
    ours: Callable[[], Tensor]
    twin: Callable[[], Tensor]
    inputs: list[Tensor]
    bytes: int = 0
    limit: Callable[[], object] | None = None
    compiles: bool = True


def cases(shape: DecoderConfig, tokens: int, device: str, dtype: torch.dtype) -> list[Case]:
    """The ops of one layer on texts of mixed length, 128 tokens in the mean."""
    sizes = tuple(lengths(tokens, 128, mixed=True))
    n, segments = sum(sizes), Segments.of(sizes, device)
    d, f, k = shape.hidden_size, shape.intermediate_size, shape.head_dim
    h, g = shape.num_attention_heads, shape.num_key_value_heads
    item, ranks = dtype.itemsize, (16, 16, 16)

    def draw(*size: int, wide: bool = False, grad: bool = True) -> Tensor:
        own = torch.float32 if wide else dtype
        return torch.randn(*size, device=device, dtype=own).requires_grad_(grad)

    index, counts = segments.index.long(), segments.lengths.float()

    def pooled(normed: Tensor) -> Tensor:
        """The mean by text, as one would write it without a kernel."""
        total = normed.new_zeros(len(sizes), d, dtype=torch.float32)
        return total.index_add(0, index, normed.float()) / counts[:, None]

    x, delta, weight = draw(n, d), draw(n, d), draw(d, grad=False)

    def norm_ours() -> Tensor:
        y, normed, mean = add_rmsnorm_pool(x, delta, weight, 1e-6, segments, pooled=True)
        assert mean is not None
        return y.sum() + normed.sum() + mean.sum()

    def norm_twin() -> Tensor:
        y = x + delta
        normed = reference.rms_norm(y, weight, 1e-6)
        return y.sum() + normed.sum() + pooled(normed).sum()

    qkv = draw(n, (h + 2 * g) * k)
    angle = draw(n, k // 2, wide=True, grad=False)
    wide_angles = [angle.cos(), angle.sin()]
    angles = [t.to(dtype) for t in wide_angles]
    norms = [draw(k, grad=False) if shape.model_type == "qwen3" else None for _ in range(2)]

    def turned(run: Callable[..., tuple[Tensor, ...]], by: list[Tensor]) -> Tensor:
        parts = run(qkv, by[0], by[1], norms[0], norms[1], 1e-6, h, g, k)
        return parts[0].sum() + parts[1].sum() + parts[2].sum()

    gate_up = draw(n, 2 * f)
    rows = len(sizes)
    means = draw(rows, d, wide=True)
    mlp = [draw(64, d, wide=True), draw(64, wide=True), draw(3, 64, wide=True), draw(3, wide=True)]
    c = torch.full((), 2.0, device=device, requires_grad=True)
    logits = draw(n, 3, wide=True)
    q, kk, v = draw(n, h, k), draw(n, g, k), draw(n, g, k)

    # As many queries as fit a step with GradCache, and two documents for each token: above 16,000
    asked, offered = draw(min(1024, n), d, wide=True), draw(2 * n, d, wide=True)
    positive = torch.arange(len(asked), device=device)
    pairs = torch.stack((positive, positive), 1)

    with torch.device(device):
        outs = {"q_proj": h * k, "k_proj": g * k, "v_proj": g * k}
        group = LinearGroup(d, outs, lora_config(ranks), dtype)
    randomise(group)
    group.settle(True)  # as served: no master is copied at every pass
    gates = draw(rows, 3, wide=True)
    a = [torch.cat([group.lora_A[name] for name in outs]).to(dtype)]
    w = torch.cat([group.weight(name) for name in outs])
    parts = [group.lora_B[name].detach().to(dtype).requires_grad_() for name in outs]
    shrink = a[0].detach().requires_grad_()

    def concat() -> Tensor:
        """x W', then addmm of (g S) B' for each linear."""
        wide = (2.0 * gates.repeat_interleave(16, 1))[index].to(dtype)
        base, s = x @ w.t(), x @ shrink.t()
        y = [
            torch.addmm(left, wide * right, b.t())
            for left, right, b in zip(base.split(list(outs.values()), 1), s.split(48, 1), parts,
                                      strict=True)
        ]  # fmt: skip
        return torch.stack([t.sum() for t in y]).sum()

    def bordered() -> Tensor:
        return group.fused(x, segments, gates, TEXT)[:, : sum(outs.values())].sum()

    def padded() -> Tensor:
        return padded_attention(q, kk, v, segments, causal=True).sum()

    return [
        Case("add_rmsnorm_pool", norm_ours, norm_twin, [x, delta], (4 * n * d + rows * d) * item),
        Case(
            "qk_norm_rope",
            lambda: turned(qk_norm_rope, wide_angles),
            lambda: turned(reference.qk_norm_rope, angles),
            [qkv],
            2 * n * (h + g) * k * item + n * k * 4,
        ),
        Case(
            "swiglu",
            lambda: swiglu(gate_up, f, 0).sum(),
            lambda: reference.swiglu(gate_up[:, :f], gate_up[:, f:]).sum(),
            [gate_up],
            3 * n * f * item,
        ),
        Case(
            "route",
            lambda: route(means, mlp[0], mlp[1], mlp[2], mlp[3], c).square().sum(),
            lambda: reference.route(means, mlp[0], mlp[1], mlp[2], mlp[3], c).square().sum(),
            [means, *mlp, c],
            (rows * d + 64 * d) * 4,
        ),
        Case(
            "sparsegen",
            lambda: fused_sparsegen(logits, c).square().sum(),
            lambda: reference.sparsegen(logits, c).square().sum(),
            [logits, c],
            n * 6 * 4,
        ),
        Case(
            "moe_lora (q, k, v)",
            bordered,
            concat,
            [x, gates, shrink, *parts, *group.parameters()],
            limit=lambda: x.detach() @ w.t(),
        ),
        Case(
            "info_nce",
            lambda: info_nce(asked, offered, positive, pairs, 0.02, 0.1, chunk=len(offered) // 4),
            lambda: reference.info_nce(asked, offered, positive, pairs, 0.02, 0.1),
            [asked, offered],
            limit=lambda: asked.detach() @ offered.detach().t(),
        ),
        Case(
            "attention",
            lambda: packed_attention(q, kk, v, segments, causal=True).sum(),
            padded,
            [q, kk, v],
            (2 * h + 2 * g) * n * k * item,
            compiles=False,
        ),
    ]


def measure(
    shape_name: str,
    shape: DecoderConfig,
    tokens: int,
    device: str,
    dtype: torch.dtype,
    budget: float = 100.0,
) -> list[dict]:
    """A row for each op and direction: milliseconds of ours, the twin, its compiled form, and the
    limit. The sums that make a scalar of the outputs are part of all of them alike."""
    rows = []
    for case in cases(shape, tokens, device, dtype):
        twins = {"ours": case.ours, "plain": case.twin}
        if case.compiles and device != "cpu":
            twins["compiled"] = torch.compile(case.twin)
        for mode in ("forward", "forward + backward"):
            found = {}
            for name, run in twins.items():
                found[name] = timing.milliseconds(_mode(run, case.inputs, mode), device, budget)
            limit = case.limit or _copy(case.bytes, device)
            found["limit"] = timing.milliseconds(limit, device, budget)
            rows.append({"op": case.name, "mode": mode, "shape": shape_name, "tokens": tokens,
                         "dtype": str(dtype)[6:], **found})  # fmt: skip
    return rows


def _mode(run: Callable[[], Tensor], inputs: list[Tensor], mode: str) -> Callable[[], object]:
    @torch.no_grad()
    def forward() -> None:
        run()

    def both() -> None:
        for t in inputs:
            t.grad = None
        run().backward()

    return forward if mode == "forward" else both


def _copy(size: int, device: str) -> Callable[[], object]:
    """Reads and writes `size` bytes in all."""
    source = torch.empty(max(size // 2, 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def bordered_rows(
    shape_name: str, shape: DecoderConfig, tokens: int, dtypes: tuple[str, ...], rounds: int
) -> list[dict]:
    """The CPU path of the MoE-LoRA linears against base + `addmm` of the concatenated experts.

    All groups of one layer, forward as it is served (no fp32 masters on either side), and with
    backward as it is trained (fp32 masters on both); rows as `bench.encoding` makes them.
    """
    d, f, k = shape.hidden_size, shape.intermediate_size, shape.head_dim
    q, kv = shape.num_attention_heads * k, shape.num_key_value_heads * k
    layer = [
        (d, {"q_proj": q, "k_proj": kv, "v_proj": kv}),
        (q, {"o_proj": d}),
        (d, {"gate_proj": f, "up_proj": f}),
        (f, {"down_proj": d}),
    ]
    rows = []
    for dtype in dtypes:
        own = DTYPES[dtype]
        groups = [LinearGroup(size, outs, lora_config((16, 16, 16)), own) for size, outs in layer]
        rivals = []
        for group in groups:
            randomise(group)
            rivals.append(ConcatGroup.of(group))
        inputs = [torch.randn(tokens, size, dtype=own).requires_grad_() for size, _ in layer]
        gates = torch.rand(tokens, 48).requires_grad_()
        modules = [*groups, *rivals]
        wanted = [*inputs, gates, *(p for module in modules for p in module.parameters())]
        upstream = [
            torch.randn(tokens, out, dtype=own) for _, outs in layer for out in outs.values()
        ]

        def ours(groups=groups, inputs=inputs, gates=gates) -> list[Tensor]:
            made = (group(x, gates) for group, x in zip(groups, inputs, strict=True))
            return [y for ys in made for y in ys]

        def theirs(rivals=rivals, inputs=inputs, gates=gates) -> list[Tensor]:
            made = (rival(x, gates) for rival, x in zip(rivals, inputs, strict=True))
            return [y for ys in made for y in ys]

        for mode in ("forward + backward", "forward"):  # the second drops the masters
            if mode == "forward":
                for group, rival in zip(groups, rivals, strict=True):
                    group.drop_masters()
                    rival.to(own)
            pair = {
                name: _passes(run, wanted, upstream, mode)
                for name, run in (("ours", ours), ("theirs", theirs))
            }
            what = f"MoE-LoRA linears of a layer of {shape_name}, {tokens} tokens, {mode}"
            rows.append(
                _row(
                    pair,
                    rounds,
                    tokens,
                    what=what,
                    dtype=dtype,
                    against="x W' + addmm, experts concatenated, linears of one input joined",
                )
            )
    return rows


def elementwise_rows(
    shape_name: str, shape: DecoderConfig, tokens: int, dtypes: tuple[str, ...], rounds: int
) -> list[dict]:
    """The norms, rotations and SwiGLU of one layer, as the CPU runs them, against the reference."""
    d, f, k = shape.hidden_size, shape.intermediate_size, shape.head_dim
    heads = shape.num_attention_heads, shape.num_key_value_heads
    rows = []
    for dtype in dtypes:
        own = DTYPES[dtype]
        sizes = [(tokens, d), (tokens, d), *((tokens, h, k) for h in heads), *[(tokens, f)] * 2]
        inputs = [torch.randn(size, dtype=own).requires_grad_() for size in sizes]
        weight, angle = torch.randn(d, dtype=own), torch.randn(tokens, k // 2)
        cos, sin = angle.cos().to(own), angle.sin().to(own)
        upstream = [torch.randn(size, dtype=own) for size in sizes[:-1]]

        def run(ops, inputs=inputs, weight=weight, cos=cos, sin=sin) -> list[Tensor]:
            normed = [ops.rms_norm(x, weight, shape.rms_norm_eps) for x in inputs[:2]]
            turned = [ops.rope(x, cos, sin) for x in inputs[2:4]]
            return [*normed, *turned, ops.swiglu(*inputs[4:])]

        for mode in ("forward + backward", "forward"):
            pair = {
                name: _passes(partial(run, ops), inputs, upstream, mode)
                for name, ops in (("ours", elementwise), ("theirs", reference))
            }
            what = f"elementwise ops of a layer of {shape_name}, {tokens} tokens, {mode}"
            rows.append(
                _row(
                    pair,
                    rounds,
                    tokens,
                    what=what,
                    dtype=dtype,
                    against="the same in plain PyTorch",
                )
            )
    return rows


def _row(pair: dict[str, Callable[[], object]], rounds: int, tokens: int, **named: str) -> dict:
    """Both sides by turns, as a row of `bench.encoding`; named: what, dtype, against."""
    times = timing.seconds(
        {name: lambda turn, call=call: call() for name, call in pair.items()}, rounds
    )
    return {
        **named,
        "unit": "tokens/s",
        "tokens": tokens * rounds,
        **timing.against(times, [float(tokens)] * rounds),
    }


def _passes(
    run: Callable[[], list[Tensor]], inputs: list[Tensor], upstream: list[Tensor], mode: str
) -> Callable[[], object]:
    """Nothing but what `run` does: the gradients of its outputs are at hand."""

    @torch.no_grad()
    def forward() -> None:
        run()

    def both() -> None:
        for t in inputs:
            t.grad = None
        torch.autograd.backward(run(), upstream)

    return forward if mode == "forward" else both

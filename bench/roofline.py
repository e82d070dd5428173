"""A written model of bytes and operations of the four designs of `bench/designs.py`.

Every op takes the longer of its operations and its bytes (a roofline); a pass takes the sum over
its ops, or its launches where the host needs longer for those.
"""

from dataclasses import dataclass

from bench.serving import RANKS
from bench.shapes import lora_parameters, parameters
from kernels.segments import CHUNK
from model.config import DecoderConfig

BYTES = 2  # of a value, fp16 or bf16
GEMM, BANDWIDTH = 0.7, 0.85  # what is attained of the data sheet's peak, assumed
LAUNCH = 20e-6  # seconds of the host for a launch, with PyTorch's and Triton's Python, assumed
HIDDEN = 64  # of the router
TOKENS, LENGTH = 16384, 128


@dataclass(frozen=True)
class Card:
    """Dense 16-bit tensor FLOP/s, bytes/s and bytes, from the vendor's data sheet."""

    name: str
    flops: float
    bandwidth: float
    memory: float


CARDS = (
    Card("T4", 65e12, 320e9, 16e9),
    Card("A100 40 GB", 312e12, 1555e9, 40e9),
    Card("H100 SXM", 989e12, 3350e9, 80e9),
)


@dataclass(frozen=True)
class Op:
    """One kernel, or `launches` of them that share the work."""

    name: str
    flops: float = 0.0
    bytes: float = 0.0
    launches: int = 1


@dataclass(frozen=True)
class Layer:
    """The numbers of one layer: N tokens in texts of `length`, rank R of all experts together.

    groups: (in, outs) of each group of linears that share an input.
    """

    shape: DecoderConfig
    n: int
    length: int
    rank: int
    experts: int

    @property
    def q(self) -> int:
        return self.shape.num_attention_heads * self.shape.head_dim

    @property
    def kv(self) -> int:
        return self.shape.num_key_value_heads * self.shape.head_dim

    @property
    def groups(self) -> list[tuple[str, int, tuple[int, ...]]]:
        d, f = self.shape.hidden_size, self.shape.intermediate_size
        return [
            ("qkv", d, (self.q, self.kv, self.kv)),
            ("o", self.q, (d,)),
            ("gate_up", d, (f, f)),
            ("down", f, (d,)),
        ]


def gemm(name: str, n: int, k: int, m: int, launches: int = 1) -> Op:
    """(n, k) times (k, m): read both, write one."""
    return Op(name, 2.0 * n * k * m, BYTES * (n * k + k * m + n * m), launches)


def _elementwise(layer: Layer, train: bool) -> list[Op]:
    """What is fused the same way in every packed design: norms, RoPE, SwiGLU, attention."""
    s, n, e = layer.shape, layer.n, BYTES
    d, f, q, kv = s.hidden_size, s.intermediate_size, layer.q, layer.kv
    attention = 2.0 * n * layer.length * q  # causal: half of 4 N L Q
    ops = [
        Op("add + norm", bytes=2 * 4 * n * d * e, launches=2),
        Op("qk norm + rope", bytes=2 * n * (q + kv) * e),
        Op("attention", attention, (2 * q + 2 * kv) * n * e),
        Op("swiglu", bytes=3 * n * f * e),
    ]
    if train:
        ops += [
            Op("add + norm, back", bytes=2 * 4 * n * d * e, launches=2),
            Op("qk norm + rope, back", bytes=n * (3 * q + 5 * kv) * e),
            Op("attention, back", 2.5 * attention, (4 * q + 4 * kv) * n * e),
            Op("swiglu, back", bytes=5 * n * f * e),
        ]
    return ops


def base(layer: Layer, train: bool) -> list[Op]:
    """The frozen base; in training the gradient of its activations."""
    ops = _elementwise(layer, train)
    for name, k, outs in layer.groups:
        ops.append(gemm(name, layer.n, k, sum(outs)))
        if train:
            ops.append(gemm(f"{name}, dX", layer.n, sum(outs), k))
    return ops


def _route(layer: Layer, train: bool) -> list[Op]:
    texts, d = layer.n / layer.length, layer.shape.hidden_size
    flops = 2.0 * texts * d * HIDDEN
    moved = 4 * (texts * d + d * HIDDEN)
    ops = [
        Op("pooled sums", bytes=4 * 2 * layer.n / CHUNK * d, launches=1),
        Op("route", flops, moved),
    ]
    return ops + [Op("route, back", 2 * flops, 3 * moved, 12)] * train


def ours(layer: Layer, train: bool) -> list[Op]:
    """Bordered GEMMs, wide buffers, shrink and gate in one pass over x."""
    n, e, r = layer.n, BYTES, layer.rank
    ops = _elementwise(layer, train) + _route(layer, train)
    for name, k, outs in layer.groups:
        out, p = sum(outs), r * len(outs)
        first, rest = outs[0], outs[1:]
        ops.append(gemm(f"{name}, first", n, k + r, first))
        if rest:
            ops.append(gemm(f"{name}, rest", n, k + r * len(rest), sum(rest)))
        # Attention's output is laid beside its spare columns on the way.
        copy = n * k if name == "o" else 0
        moved = e * (n * k + k * p + 2 * n * p + copy)
        ops.append(Op(f"{name}, shrink", 2.0 * n * k * p, moved))
        if train:
            for i, m in enumerate(outs):
                ops += [gemm(f"{name} {i}, dY B", n, m, r), gemm(f"{name} {i}, dB", m, n, r)]
            ops.append(Op(f"{name}, gate back", bytes=3 * n * p * e))
            ops.append(gemm(f"{name}, dX", n, out + p, k))
            ops.append(gemm(f"{name}, dA", p, n, k))
    return ops


def addmm(layer: Layer, train: bool) -> list[Op]:
    """Concatenated experts, a second GEMM into each y, linears of one input joined; elementwise
    work fused by torch.compile."""
    n, e, r = layer.n, BYTES, layer.rank
    ops = _elementwise(layer, train) + _route(layer, train)
    for name, k, outs in layer.groups:
        out, p = sum(outs), r * len(outs)
        ops += [gemm(name, n, k, out), gemm(f"{name}, S", n, k, p)]
        ops.append(Op(f"{name}, gate", bytes=2 * n * p * e))
        for i, m in enumerate(outs):
            moved = e * (n * r + r * m + 2 * n * m)
            ops.append(Op(f"{name} {i}, addmm", 2.0 * n * r * m, moved))
            if train:
                ops += [gemm(f"{name} {i}, dY B", n, m, r), gemm(f"{name} {i}, dB", m, n, r)]
        if train:
            if len(outs) > 1:  # the gradients of the parts are laid side by side
                ops.append(Op(f"{name}, joined dY", bytes=2 * n * out * e))
            ops += [
                gemm(f"{name}, dX", n, out, k),
                Op(f"{name}, gate back", bytes=3 * n * p * e),
                gemm(f"{name}, dS A", n, p, k),
                gemm(f"{name}, dA", p, n, k),
                Op(f"{name}, sum of dX", bytes=3 * n * k * e),
            ]
    return ops


def loop(layer: Layer, train: bool) -> list[Op]:
    """A pass over y for each step of each expert, and PyTorch's unfused elementwise ops."""
    n, e, s = layer.n, BYTES, layer.shape
    d, f, q, kv = s.hidden_size, s.intermediate_size, layer.q, layer.kv
    times = 3 if train else 1  # an elementwise op's backward moves about twice its bytes
    attention = 2.0 * n * layer.length * q
    ops = [
        Op("residual adds", bytes=times * 2 * 3 * n * d * e, launches=2 * times),
        Op("norms", bytes=times * 2 * 36 * n * d, launches=12 * times),
        Op("rope", bytes=times * 18 * n * (q + kv), launches=8 * times),
        Op("attention", attention * (3.5 if train else 1), times * (2 * q + 2 * kv) * n * e, times),
        Op("swiglu", bytes=times * 10 * n * f, launches=2 * times),
    ]
    if s.model_type == "qwen3":
        ops.append(Op("qk norms", bytes=times * 36 * n * (q + kv), launches=12 * times))
    r = layer.rank / layer.experts
    for name, k, outs in layer.groups:
        for m in outs:
            ops.append(gemm(name, n, k, m))
            if train:
                ops.append(gemm(f"{name}, dX", n, m, k))
            for _ in range(layer.experts):
                ops += [
                    Op(f"{name}, A", 2.0 * n * k * r, e * (n * k + n * r)),
                    Op(f"{name}, B", 2.0 * n * r * m, e * (n * r + n * m)),
                    Op(f"{name}, scale, gate, add", bytes=7 * n * m * e, launches=3),
                ]
                if train:
                    ops += [
                        Op(f"{name}, scale, gate, back", bytes=6 * n * m * e, launches=3),
                        Op(f"{name}, dS and dB", 4.0 * n * r * m, 2 * e * (n * m + n * r), 2),
                        Op(f"{name}, dX and dA", 4.0 * n * r * k, e * (2 * n * k + 2 * n * r), 2),
                        Op(f"{name}, sum of dX", bytes=3 * n * k * e),
                    ]
    return ops


DESIGNS = {"base": base, "loop": loop, "addmm": addmm, "ours": ours}


def seconds(ops: list[Op], card: Card) -> float:
    """Of one layer: the device's time, or the host's where its launches take longer."""
    device = sum(
        max(op.flops / (GEMM * card.flops), op.bytes / (BANDWIDTH * card.bandwidth)) for op in ops
    )
    return max(device, LAUNCH * sum(op.launches for op in ops))


def predict(
    shape: DecoderConfig, design: str, card: Card, train: bool, tokens: int = TOKENS,
    length: int = LENGTH, ranks: tuple[int, ...] = (16, 16, 16),
) -> dict:  # fmt: skip
    """Seconds of a pass through all layers, tokens/s, and the FLOP/s of the base's work."""
    layer = Layer(shape, tokens, length, sum(ranks), len(ranks))
    ops = DESIGNS[design](layer, train)
    total = shape.num_hidden_layers * seconds(ops, card)
    work = shape.num_hidden_layers * sum(op.flops for op in base(layer, train))
    return {"seconds": total, "rate": tokens / total, "utilisation": work / total / card.flops}


def operations_alone(shape: DecoderConfig, ranks: tuple[int, ...] = (16, 16, 16)) -> float:
    """FLOPs of the forward pass with experts, over those of the base: base weights and A, B."""
    layer = Layer(shape, 1, LENGTH, sum(ranks), len(ranks))
    weights = sum(k * sum(outs) for _, k, outs in layer.groups)
    experts = sum(ranks) * lora_parameters(shape) / shape.num_hidden_layers
    return (weights + experts) / weights


def memory(shape: DecoderConfig, ranks: tuple[int, ...] = RANKS) -> dict[str, float]:
    """Bytes of two whole models, and of one with experts and routers, 16-bit, no masters."""
    base_bytes = BYTES * parameters(shape)
    routers = shape.num_hidden_layers * (
        HIDDEN * (shape.hidden_size + 1) + len(ranks) * (HIDDEN + 1)
    )
    one = base_bytes + BYTES * sum(ranks) * lora_parameters(shape) + 4 * routers
    return {"two": 2 * base_bytes, "one": one, "saved": 1 - one / (2 * base_bytes)}

"""The whole model in four designs, on random weights of a real shape: forward and training step.

    base      the frozen base alone, on our kernels: what the experts and the router add stands
              against this
    loop      transformers, padded, and in every linear a loop over the experts as peft runs it
    addmm     packed, the experts concatenated: y = x W' + (g S) B' by `addmm`, torch.compile: the
              baseline that counts
    ours      the bordered GEMMs and the kernels

All have the same experts on all seven projections of all layers and the same number of texts. The
router is in `addmm` and `ours`; `loop` gets its weights for nothing, in the rival's favour.
"""

import gc
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from bench import timing
from bench.shapes import SHAPES
from kernels.attention import packed_attention
from kernels.reference import rms_norm, rope, swiglu
from kernels.segments import Segments
from kernels.sparsegen import sparsegen
from model.config import DecoderConfig
from model.lora import PROJECTIONS, LinearGroup, LoRAConfig
from model.packed import Packed, pack
from model.router import RouterConfig
from model.transformer import Decoder

EXPERTS = ("embedding", "reranking", "shared")


def lengths(tokens: int, mean: int, mixed: bool, seed: int = 0) -> list[int]:
    """Texts that add up to `tokens`: equally long, or log-normal as passages are, sorted."""
    if not mixed:
        return [mean] * max(1, tokens // mean)
    draw, made = random.Random(seed), []
    while sum(made) < tokens:
        # sigma 0.6 is about that of MS MARCO passages; the mean of exp(N) is exp(mu + s^2 / 2)
        size = round(mean * draw.lognormvariate(-0.18, 0.6))
        made.append(min(max(size, 4), 4 * mean, max(1, tokens - sum(made))))
    return sorted(made)


def lora_config(ranks: Sequence[int]) -> LoRAConfig:
    return LoRAConfig(EXPERTS, tuple(ranks), tuple(2.0 * rank for rank in ranks))


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    """Weights that keep activations finite; speed and memory do not depend on their values."""
    matrices = [p for p in module.parameters() if p.ndim == 2]
    for child in module.modules():
        if isinstance(child, LinearGroup):  # not the whole buffer: its zero blocks must stay zero
            matrices += [child.weight(name) for name in child.outs]
    for t in matrices:
        t.normal_(std=t.shape[1] ** -0.5)


# The loop over experts ---------------------------------------------------------------------


class LoopLinear(nn.Module):
    """A frozen linear and its experts one after the other, as peft adds up active adapters."""

    def __init__(self, base: nn.Linear, ranks: Sequence[int], shared: dict[str, Tensor]):
        super().__init__()
        self.base, self.shared = base, shared
        place = {"device": base.weight.device, "dtype": base.weight.dtype}
        out, features = base.weight.shape
        self.a = nn.ModuleList(nn.Linear(features, r, bias=False, **place) for r in ranks)
        self.b = nn.ModuleList(nn.Linear(r, out, bias=False, **place) for r in ranks)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for i, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            y = y + b(a(x)) * 2.0 * self.shared["weights"][:, i, None, None]
        return y


class Loop(nn.Module):
    """transformers' model of the same shape, every projection a `LoopLinear`."""

    def __init__(self, shape: DecoderConfig, ranks: Sequence[int], device: str, dtype: torch.dtype):
        super().__init__()
        config = AutoConfig.for_model(
            shape.model_type,
            **{name: getattr(shape, name) for name in (
                "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim", "vocab_size", "rms_norm_eps", "sliding_window",
            )},
        )  # fmt: skip
        with torch.device(device):
            self.model = AutoModel.from_config(config, dtype=dtype, attn_implementation="sdpa")
        self.model.requires_grad_(False)
        self.shared: dict[str, Tensor] = {}
        for module in list(self.model.modules()):
            for name, child in list(module.named_children()):
                if name in PROJECTIONS:
                    setattr(module, name, LoopLinear(child, ranks, self.shared))

    def forward(self, batch: Packed) -> Tensor:
        """The padded hidden states; what is padding is not read."""
        longest = max(batch.lengths)
        rows = list(batch.input_ids.split(list(batch.lengths)))
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        sizes = torch.tensor(batch.lengths, device=ids.device)[:, None]
        mask = torch.arange(longest, device=ids.device) < sizes
        self.shared["weights"] = ids.new_full((len(ids), 3), 1 / 3, dtype=self.model.dtype)
        out = self.model(input_ids=ids, attention_mask=mask.long(), use_cache=False)[0]
        return out[mask]


# Concatenated experts with addmm, compiled -------------------------------------------------


class ConcatGroup(nn.Module):
    """Linears of one input: y = x W', then addmm of (g S) B' for each; the experts concatenated
    along the rank, W' and A' of all of them joined, so that x is read twice."""

    def __init__(self, features: int, outs: Sequence[int], rank: int):
        super().__init__()
        self.outs, self.rank = tuple(outs), rank
        self.w = nn.Parameter(torch.empty(sum(outs), features), requires_grad=False)
        self.a = nn.Parameter(torch.empty(len(outs) * rank, features))
        self.b = nn.ParameterList(nn.Parameter(torch.empty(out, rank)) for out in outs)

    @classmethod
    @torch.no_grad()
    def of(cls, group: LinearGroup) -> "ConcatGroup":
        """The same linears with the same masters."""
        made = cls(group.layout.in_features, tuple(group.outs.values()), group.layout.rank)
        made.w.data = torch.cat([group.weight(name) for name in group.outs])
        made.a.copy_(torch.cat([group.lora_A[name] for name in group.outs]))
        for b, name in zip(made.b, group.outs, strict=True):
            b.copy_(group.lora_B[name])
        return made

    def forward(self, x: Tensor, gates: Tensor) -> list[Tensor]:
        s = (x @ self.a.to(x.dtype).t()).split(self.rank, 1)
        y = (x @ self.w.t()).split(self.outs, 1)
        return [
            torch.addmm(base, (gates * mine).to(x.dtype), b.to(x.dtype).t())
            for base, mine, b in zip(y, s, self.b, strict=True)
        ]


def _packed(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    return packed_attention(q, k, v, segments, causal=True)


# Outside the compiled graphs, which would otherwise depend on the lengths of each batch.
_attend: Any = torch.compiler.disable(_packed)


class ConcatLayer(nn.Module):
    """A layer with one router for its texts, in the plain formulas that torch.compile fuses."""

    def __init__(self, shape: DecoderConfig, ranks: Sequence[int]):
        super().__init__()
        self.shape, self.ranks = shape, tuple(ranks)
        d, f, k = shape.hidden_size, shape.intermediate_size, shape.head_dim
        q, kv = shape.num_attention_heads * k, shape.num_key_value_heads * k
        rank = sum(ranks)
        self.qkv, self.o = ConcatGroup(d, (q, kv, kv), rank), ConcatGroup(q, (d,), rank)
        self.gate_up, self.down = ConcatGroup(d, (f, f), rank), ConcatGroup(f, (d,), rank)
        norms = [d, d] + [k, k] * (shape.model_type == "qwen3")
        self.norms = nn.ParameterList(nn.Parameter(torch.ones(n), False) for n in norms)
        self.router_up, self.router_down = nn.Linear(d, 64), nn.Linear(64, len(ranks))
        self.c = nn.Parameter(torch.tensor(2.0))

    def gates(self, normed: Tensor, text: Tensor, sizes: Tensor) -> Tensor:
        """(N, R): the router's weights of each token's text, over the ranks."""
        total = normed.new_zeros(len(sizes), normed.shape[1], dtype=torch.float32)
        pooled = total.index_add(0, text, normed.float()) / sizes[:, None]
        z = self.router_up(F.rms_norm(pooled, pooled.shape[-1:]))
        weights = sparsegen(self.router_down(F.silu(z)), self.c)
        repeats = torch.tensor(self.ranks, device=text.device)
        wide = weights.repeat_interleave(repeats, 1, output_size=sum(self.ranks))
        return (2.0 * wide)[text]

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, text: Tensor, sizes: Tensor, segments):
        c, k = self.shape, self.shape.head_dim
        normed = rms_norm(x, self.norms[0], c.rms_norm_eps)
        gates = self.gates(normed, text, sizes)
        q, kk, v = (y.unflatten(1, (-1, k)) for y in self.qkv(normed, gates))
        if c.model_type == "qwen3":
            q, kk = (rms_norm(t, w, c.rms_norm_eps) for t, w in zip((q, kk), self.norms[2:],
                                                                   strict=True))  # fmt: skip
        y = _attend(rope(q, cos, sin), rope(kk, cos, sin), v, segments)
        x = x + self.o(y.flatten(1), gates)[0]
        normed = rms_norm(x, self.norms[1], c.rms_norm_eps)
        y = swiglu(*self.gate_up(normed, gates))
        return x + self.down(y, gates)[0]


class Concatenated(nn.Module):
    """The packed model of `ConcatLayer`s, each compiled on a card."""

    def __init__(self, shape: DecoderConfig, ranks: Sequence[int], device: str, dtype: torch.dtype):
        super().__init__()
        self.shape = shape
        with torch.device(device):
            self.embed = nn.Embedding(shape.vocab_size, shape.hidden_size, dtype=dtype)
            self.layers = nn.ModuleList(
                ConcatLayer(shape, ranks) for _ in range(shape.num_hidden_layers)
            )
            self.norm = nn.Parameter(torch.ones(shape.hidden_size, dtype=dtype), False)
        self.embed.requires_grad_(False)
        for layer in self.layers:
            assert isinstance(layer, ConcatLayer)
            for group in (layer.qkv, layer.o, layer.gate_up, layer.down):
                group.to(dtype)
            layer.norms.to(dtype)
        if device != "cpu":
            for layer in self.layers:
                layer.compile(dynamic=True)

    def forward(self, batch: Packed) -> Tensor:
        x, segments = self.embed(batch.input_ids), batch.segments
        k = self.shape.head_dim
        at = torch.arange(0, k, 2, device=x.device).float() / k
        angle = batch.positions.float()[:, None] / self.shape.rope_theta**at
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        text, sizes = segments.index.long(), segments.lengths.float()

        for layer in self.layers:
            x = layer(x, cos, sin, text, sizes, segments)
        return rms_norm(x, self.norm, self.shape.rms_norm_eps)


# Ours --------------------------------------------------------------------------------------


class Ours(nn.Module):
    def __init__(
        self,
        shape: DecoderConfig,
        ranks: Sequence[int] | None,
        device: str,
        dtype: torch.dtype,
        fused: bool = True,
    ):
        super().__init__()
        lora = None if ranks is None else lora_config(ranks)
        with torch.device(device):
            self.decoder = Decoder(shape, lora, lora and RouterConfig(), dtype, fused=fused)

    def forward(self, batch: Packed) -> Tensor:
        return self.decoder(batch)[0]


@dataclass(frozen=True)
class Design:
    """make: (shape, device, dtype, ranks) -> a model that maps a Packed to hidden states."""

    name: str
    make: Callable[[DecoderConfig, str, torch.dtype, Sequence[int]], nn.Module]
    trains: bool = True


DESIGNS = (
    Design("base", lambda s, device, dtype, r: Ours(s, None, device, dtype), trains=False),
    Design("loop", lambda s, device, dtype, r: Loop(s, r, device, dtype)),
    Design("addmm", lambda s, device, dtype, r: Concatenated(s, r, device, dtype)),
    Design("ours", lambda s, device, dtype, r: Ours(s, r, device, dtype)),
)


def flops(shape: DecoderConfig, sizes: Sequence[int], train: bool) -> float:
    """Of the frozen base: 2 for each weight and token, and the causal attention; in training the
    gradient of the activations costs as much again, that of attention 2.5 times its forward."""
    d, k, f = shape.hidden_size, shape.head_dim, shape.intermediate_size
    q, kv = shape.num_attention_heads * k, shape.num_key_value_heads * k
    weights = d * (2 * q + 2 * kv) + 3 * d * f
    linear = 2 * weights * sum(sizes)
    attention = sum(2 * q * n * (n + 1) for n in sizes)
    per_layer = 2 * linear + 3.5 * attention if train else linear + attention
    return shape.num_hidden_layers * per_layer


def measure(
    shape_name: str,
    tokens: int,
    mixed: bool,
    device: str,
    dtype: torch.dtype,
    ranks: Sequence[int],
    rounds: int,
    modes: Sequence[str] = ("forward", "train"),
    shape: DecoderConfig | None = None,
) -> list[dict]:
    """Rows of each design and mode: tokens/s, peak memory, FLOP/s of the base's work, and how many
    times as fast ours is. Ours and one rival at a time are resident and take turns.

    Raises:
        torch.OutOfMemoryError: ours alone does not fit; a rival that does not is a row that says so
    """
    shape = shape or SHAPES[shape_name]
    sizes = lengths(tokens, 128, mixed)
    batch = pack([[1 + i % 99 for i in range(n)] for n in sizes], device)
    about = {"shape": shape_name, "tokens": sum(sizes), "lengths": "mixed" if mixed else "equal",
             "ranks": list(ranks), "dtype": str(dtype)[6:]}  # fmt: skip
    rows: list[dict] = []
    ours, *rivals = sorted(DESIGNS, key=lambda design: design.name != "ours")
    both = [_made(ours, shape, device, dtype, ranks)]
    clear = partial(_clear, both, device)
    for rival in rivals:
        for mode in modes:
            if mode == "train" and not rival.trains:
                continue
            try:
                if len(both) == 1:
                    both.append(_made(rival, shape, device, dtype, ranks))
                mine, theirs = both
                pair = {"theirs": _step(theirs, batch, mode), "ours": _step(mine, batch, mode)}
                peaks = {name: timing.peak(step, device, clear) for name, step in pair.items()}
                times = timing.seconds(pair, rounds)
            except torch.OutOfMemoryError:
                failed = {"failed": "out of memory, ours resident too"}
                rows.append(about | {"design": rival.name, "mode": mode} | failed)
                continue
            finally:
                clear()
            rates = timing.rates(times, [float(sum(sizes))] * rounds)
            work = flops(shape, sizes, mode == "train") / sum(sizes)
            for (name, above), model, design in zip(
                peaks.items(), (theirs, mine), (rival, ours), strict=True
            ):
                row = about | {"design": design.name, "mode": mode, "rounds": rounds}
                row["rate"], row["flops"] = rates[name], work * rates[name]["median"]
                row["peak_bytes"] = None if above is None else above + resident(model)
                row["ours_against"] = timing.ratio(times, "ours", "theirs")
                if design is rival or not any(_same(row, other) for other in rows):
                    rows.append(row)
        mine = theirs = pair = None  # what is still named stays resident
        del both[1:]
        clear()
    return rows


def _same(row: dict, other: dict) -> bool:
    return all(row[key] == other[key] for key in ("design", "mode"))


def _made(design: Design, shape, device: str, dtype: torch.dtype, ranks) -> nn.Module:
    model = design.make(shape, device, dtype, ranks)
    randomise(model)
    return model


def resident(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _clear(models: Sequence[nn.Module], device: str) -> None:
    for model in models:
        for p in model.parameters():
            p.grad = None
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def _step(model: nn.Module, batch: Packed, mode: str) -> Callable[[int], object]:
    """A forward pass, or forward and backward into the gradients of everything trainable."""

    for group in model.modules():  # as `Decoder.serving`: no master is copied at every pass
        if isinstance(group, LinearGroup) and group.adapted_names:
            group.settle(mode != "train")

    @torch.no_grad()
    def forward(turn: int) -> None:
        model.eval()
        model(batch)

    def step(turn: int) -> None:
        model.train()
        for p in model.parameters():
            p.grad = None
        model(batch).float().square().mean().backward()

    return step if mode == "train" else forward

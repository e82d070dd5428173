"""The decoder: Qwen3, Mistral and Llama, on packed sequences, with experts and router inside.

Shapes: B sequences, N packed tokens, D hidden, H query heads, G key/value heads, K head size,
E experts, R total rank. Parameter names are Hugging Face's, so loading needs no map.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.attention import attention
from kernels.reference import rms_norm, rope, swiglu
from model.lora import LinearGroup, LoRAConfig
from model.router import Router, RouterConfig
from model.weights import read_json

FAMILIES = ("qwen3", "mistral", "llama")


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder; the names are those of Hugging Face's config.json."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool = True
    sliding_window: int | None = None
    causal: bool = True

    @classmethod
    def read(cls, folder: Path, layers: int | None = None, causal: bool = True) -> "DecoderConfig":
        """From `folder`/config.json, keeping the first `layers` layers (None: all).

        Raises:
            ValueError: a family, activation, bias or RoPE scaling that is not implemented here, a
                key that is missing, or more layers than there are.
        """
        path = folder / "config.json"
        raw = read_json(path)
        if raw.get("model_type") not in FAMILIES:
            raise ValueError(
                f"{path}: model_type {raw.get('model_type')!r} is not one of {FAMILIES}"
            )
        rope_parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        rope_type = rope_parameters.get("rope_type", rope_parameters.get("type", "default"))
        for name, found, expected in (
            ("hidden_act", raw.get("hidden_act", "silu"), "silu"),
            ("attention_bias", raw.get("attention_bias", False), False),
            ("mlp_bias", raw.get("mlp_bias", False), False),
            ("rope type", rope_type, "default"),
        ):
            if found != expected:
                raise ValueError(f"{path}: {name} is {found!r}, only {expected!r} is implemented")
        window = raw.get("sliding_window")
        if raw["model_type"] == "qwen3" and not raw.get("use_sliding_window", False):
            window = None
        elif raw["model_type"] == "qwen3":
            raise ValueError(f"{path}: use_sliding_window of Qwen3 is not implemented")
        try:
            heads = raw["num_attention_heads"]
            config = cls(
                model_type=raw["model_type"],
                hidden_size=raw["hidden_size"],
                intermediate_size=raw["intermediate_size"],
                num_hidden_layers=raw["num_hidden_layers"],
                num_attention_heads=heads,
                num_key_value_heads=raw.get("num_key_value_heads") or heads,
                head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
                vocab_size=raw["vocab_size"],
                rms_norm_eps=raw["rms_norm_eps"],
                rope_theta=float(rope_parameters.get("rope_theta") or raw["rope_theta"]),
                tie_word_embeddings=raw.get("tie_word_embeddings", False),
                sliding_window=window,
                causal=causal,
            )
        except KeyError as missing:
            raise ValueError(f"{path}: key {missing} is missing") from None
        return config if layers is None else config.first(layers, path)

    def first(self, layers: int, path: Path | str = "config") -> "DecoderConfig":
        """The same model cut after its first `layers` layers (the final norm stays)."""
        if not 1 <= layers <= self.num_hidden_layers:
            raise ValueError(
                f"{path}: layers={layers}, but this base has {self.num_hidden_layers}: "
                f"ask for 1 to {self.num_hidden_layers}"
            )
        return replace(self, num_hidden_layers=layers)


@dataclass(frozen=True)
class Packed:
    """A batch as one row of N tokens.

    input_ids, positions, sequence: (N,) int64: token, place in its text, and which text.
    lengths: tokens of each text. last: (B,) where each text's last token is.
    groups: (count, length) of each run of equally long texts.
    """

    input_ids: Tensor
    positions: Tensor
    sequence: Tensor
    last: Tensor
    lengths: tuple[int, ...]
    groups: list[tuple[int, int]]

    @property
    def cu_seqlens(self) -> Tensor:
        """(B + 1,) int32: where each text starts, and N."""
        ends = torch.zeros(len(self.lengths) + 1, dtype=torch.int32, device=self.last.device)
        ends[1:] = self.last + 1
        return ends


def pack(texts: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Packed:
    """Token ids of B texts -> Packed. Sort the texts by length first where speed matters.

    Raises:
        ValueError: for no text at all, or a text without tokens (its pooling is undefined).
    """
    lengths = tuple(len(text) for text in texts)
    if not lengths or min(lengths) == 0:
        raise ValueError(f"need at least one text and one token in each, got lengths {lengths}")
    sizes = torch.tensor(lengths)
    ends = sizes.cumsum(0)
    starts = (ends - sizes).repeat_interleave(sizes)
    return Packed(
        input_ids=torch.tensor([i for text in texts for i in text]).to(device),
        positions=(torch.arange(int(ends[-1])) - starts).to(device),
        sequence=torch.arange(len(lengths)).repeat_interleave(sizes).to(device),
        last=(ends - 1).to(device),
        lengths=lengths,
        groups=[(len(list(run)), length) for length, run in groupby(lengths)],
    )


def segment_mean(x: Tensor, batch: Packed) -> Tensor:
    """(N, D) -> (B, D): mean over each text's own tokens, in fp32 or wider."""
    wide = x if x.dtype == torch.float64 else x.float()
    runs = wide.split([count * length for count, length in batch.groups])
    return torch.cat(
        [run.unflatten(0, shape).mean(1) for run, shape in zip(runs, batch.groups, strict=True)]
    )


def per_token(rows: Tensor, batch: Packed) -> Tensor:
    """(B, R) -> (N, R): each text's row once for each of its tokens.

    Not `rows[batch.sequence]`: its gradient is added up by threads in whatever order they come,
    so the same seed would not give the same losses. The gradient of `expand` is a plain sum.
    """
    runs = rows.split([count for count, _ in batch.groups])
    return torch.cat(
        [
            run[:, None].expand(-1, length, -1).flatten(0, 1)
            for run, (_, length) in zip(runs, batch.groups, strict=True)
        ]
    )


class RMSNorm(nn.Module):
    def __init__(self, features: int, eps: float, dtype: torch.dtype):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, lora: LoRAConfig | None, dtype: torch.dtype):
        super().__init__()
        self.config = config
        k = config.head_dim
        q_out, kv_out = config.num_attention_heads * k, config.num_key_value_heads * k
        self.qkv = LinearGroup(
            config.hidden_size, {"q_proj": q_out, "k_proj": kv_out, "v_proj": kv_out}, lora, dtype
        )
        self.o = LinearGroup(q_out, {"o_proj": config.hidden_size}, lora, dtype)
        if config.model_type == "qwen3":
            self.q_norm = RMSNorm(k, config.rms_norm_eps, dtype)
            self.k_norm = RMSNorm(k, config.rms_norm_eps, dtype)

    def forward(self, x: Tensor, batch: Packed, cos: Tensor, sin: Tensor, gates) -> Tensor:
        q, k, v = (t.unflatten(1, (-1, self.config.head_dim)) for t in self.qkv(x, gates))
        if self.config.model_type == "qwen3":
            q, k = self.q_norm(q), self.k_norm(k)  # (N, H, K), (N, G, K)
        y = attention(
            rope(q, cos, sin),
            rope(k, cos, sin),
            v,
            batch.groups,
            causal=self.config.causal,
            window=self.config.sliding_window,
        )
        return self.o(y.flatten(1), gates)[0]


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig, lora: LoRAConfig | None, dtype: torch.dtype):
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.gate_up = LinearGroup(d, {"gate_proj": f, "up_proj": f}, lora, dtype)
        self.down = LinearGroup(f, {"down_proj": d}, lora, dtype)

    def forward(self, x: Tensor, gates: Tensor | None) -> Tensor:
        gate, up = self.gate_up(x, gates)
        return self.down(swiglu(gate, up), gates)[0]


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig, lora: LoRAConfig | None, router, dtype: torch.dtype):
        super().__init__()
        self.self_attn = Attention(config, lora, dtype)
        self.mlp = MLP(config, lora, dtype)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.router: Router | None = router
        self.lora = lora
        if lora is not None:
            scale = [
                alpha / rank
                for alpha, rank in zip(lora.alphas, lora.ranks, strict=True)
                for _ in range(rank)
            ]
            master = torch.float64 if dtype == torch.float64 else torch.float32
            self.scale: Tensor  # (R,) alpha_i / r_i repeated over the ranks
            self.register_buffer("scale", torch.tensor(scale, dtype=master), persistent=False)

    def forward(
        self, x: Tensor, batch: Packed, cos: Tensor, sin: Tensor, tasks: Tensor, weights, base: bool
    ) -> tuple[Tensor, Tensor | None]:
        """x (N, D) -> x (N, D) and the router's weights (B, E), None where there is no router."""
        normed = self.input_layernorm(x)
        gates = None
        if self.lora is not None and not base:
            if weights is None and self.router is not None:
                weights = self.router(segment_mean(normed, batch), tasks)
            if weights is None:  # no router: every expert counts in full
                gates = self.scale[None]
            else:
                columns = zip(weights.split(1, 1), self.lora.ranks, strict=True)
                gates = torch.cat([w.expand(-1, rank) for w, rank in columns], 1) * self.scale
                gates = per_token(gates, batch)  # (B, R) -> (N, R)
        x = x + self.self_attn(normed, batch, cos, sin, gates)
        x = x + self.mlp(self.post_attention_layernorm(x), gates)
        return x, weights


class Decoder(nn.Module):
    """Token ids -> hidden states. Weights are zero until `model.weights.load_into` fills them.

    Args:
        lora: experts in every layer from `lora.first_layer` up; None for the bare base.
        router: weighs them; None: each expert counts with weight 1.
        dtype: of the base and of the activations.
        checkpointing: recompute each layer in the backward pass instead of storing it.
    """

    def __init__(
        self,
        config: DecoderConfig,
        lora: LoRAConfig | None = None,
        router: RouterConfig | None = None,
        dtype: torch.dtype = torch.float32,
        checkpointing: bool = False,
    ):
        super().__init__()
        if lora is not None and not 0 <= lora.first_layer < config.num_hidden_layers:
            raise ValueError(
                f"experts from layer {lora.first_layer} up, but the model has layers "
                f"0 to {config.num_hidden_layers - 1}"
            )
        self.config, self.lora, self.checkpointing = config, lora, checkpointing
        self.embed_tokens = nn.Embedding(
            config.vocab_size,
            config.hidden_size,
            _weight=torch.zeros(config.vocab_size, config.hidden_size, dtype=dtype),
            _freeze=True,
        )
        self.layers = nn.ModuleList()
        for i in range(config.num_hidden_layers):
            mine = lora if lora is not None and i >= lora.first_layer else None
            gate = None
            if mine is not None and router is not None:
                gate = Router(config.hidden_size, mine.experts, router)
                gate = gate.double() if dtype == torch.float64 else gate
            self.layers.append(DecoderLayer(config, mine, gate, dtype))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)

    def named_weights(self) -> dict[str, Tensor]:
        """Every frozen tensor under its Hugging Face name, as views into the final buffers."""
        tensors = {
            "model.embed_tokens.weight": self.embed_tokens.weight,
            "model.norm.weight": self.norm.weight,
        }
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            prefix, attn = f"model.layers.{i}.", layer.self_attn
            for part, groups in (
                ("self_attn", (attn.qkv, attn.o)),
                ("mlp", (layer.mlp.gate_up, layer.mlp.down)),
            ):
                for group in groups:
                    for name in group.outs:
                        tensors[f"{prefix}{part}.{name}.weight"] = group.weight(name)
            for name, parameter in layer.named_parameters():
                if name.endswith("norm.weight"):
                    tensors[prefix + name] = parameter
        return tensors

    def rope_table(self, batch: Packed, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (N, K / 2) of position * theta^(-2i / K)."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        k = self.config.head_dim
        at = torch.arange(0, k, 2, device=batch.positions.device).to(wide)
        frequency = 1.0 / self.config.rope_theta ** (at / k)
        angle = batch.positions.to(wide)[:, None] * frequency
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def forward(
        self,
        batch: Packed,
        tasks: Tensor | None = None,
        *,
        hidden: Tensor | None = None,
        first_layer: int = 0,
        last_layer: int | None = None,
        weights: Tensor | None = None,
        base: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the layers first_layer <= i < last_layer on a packed batch.

        Args:
            batch: B texts, N tokens.
            tasks: (B,) int64 index into `router.TASKS`; 0 for all where None.
            hidden: (N, D), what enters `first_layer`; None: the embedded tokens.
            last_layer: stop before this layer and skip the final norm; None: run to the end.
            weights: (B, E), used instead of every router's.
            base: leave experts and routers out.
        Returns:
            (N, D) hidden states, and the (B, E) weights of each routed layer.
        """
        x = self.embed_tokens(batch.input_ids) if hidden is None else hidden
        if tasks is None:
            tasks = torch.zeros(len(batch.lengths), dtype=torch.int64, device=x.device)
        cos, sin = self.rope_table(batch, x.dtype)
        routing = []
        for layer in self.layers[first_layer:last_layer]:
            if self.checkpointing and torch.is_grad_enabled():
                x, used = checkpoint(
                    layer, x, batch, cos, sin, tasks, weights, base, use_reentrant=False
                )
            else:
                x, used = layer(x, batch, cos, sin, tasks, weights, base)
            if used is not None:
                routing.append(used)
        return (self.norm(x) if last_layer is None else x), routing

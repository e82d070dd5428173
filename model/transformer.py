"""The decoder: Qwen3, Mistral and Llama, on packed sequences, with experts and router inside.

Shapes: B sequences, N packed tokens, D hidden, H query heads, G key/value heads, K head size,
E experts, R total rank. Parameter names are Hugging Face's, so loading needs no map.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.add_rmsnorm_pool import add_rmsnorm_pool
from kernels.attention import attention, packed_attention
from kernels.qk_norm_rope import qk_norm_rope
from kernels.reference import rms_norm, rope, swiglu
from kernels.shrink import ALL, TEXT, TOKEN
from kernels.swiglu import swiglu as fused_swiglu
from model.config import DecoderConfig
from model.lora import LinearGroup, LoRAConfig
from model.packed import Packed, per_token, segment_mean
from model.router import SIMILARITY, Router, RouterConfig


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

    def fused(
        self,
        normed: Tensor,
        batch: Packed,
        cos: Tensor,
        sin: Tensor,
        weights,
        mode: int | None,
        router,
    ) -> tuple[Tensor, Tensor | None]:
        """The same on wide buffers; and the weights, which a `router` of tokens finds in here."""
        c, segments = self.config, batch.segments
        if router is None:
            y = self.qkv.fused(normed, segments, weights, mode)
        else:
            y, weights = self.qkv.routed(normed, segments, router)
        norms = (None, None)
        if c.model_type == "qwen3":
            norms = (self.q_norm.weight, self.k_norm.weight)
        shape = (c.num_attention_heads, c.num_key_value_heads, c.head_dim)
        q, k, v = qk_norm_rope(y, cos, sin, *norms, c.rms_norm_eps, *shape)
        y = packed_attention(q, k, v, segments, causal=c.causal, window=c.sliding_window)
        return self.o.fused(y.flatten(1), segments, weights, mode), weights


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig, lora: LoRAConfig | None, dtype: torch.dtype):
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.gate_up = LinearGroup(d, {"gate_proj": f, "up_proj": f}, lora, dtype)
        self.down = LinearGroup(f, {"down_proj": d}, lora, dtype)

    def forward(self, x: Tensor, gates: Tensor | None) -> Tensor:
        gate, up = self.gate_up(x, gates)
        return self.down(swiglu(gate, up), gates)[0]

    def fused(
        self, normed: Tensor, batch: Packed, weights: Tensor | None, mode: int | None
    ) -> Tensor:
        """The same on wide buffers."""
        y = self.gate_up.fused(normed, batch.segments, weights, mode)
        down = self.down.layout
        y = fused_swiglu(y, down.in_features, down.shape[1] - down.in_features)
        return self.down.fused(y, batch.segments, weights, mode)


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
        self,
        x: Tensor,
        delta: Tensor | None,
        batch: Packed,
        cos: Tensor,
        sin: Tensor,
        tasks: Tensor,
        weights: Tensor | None,
        base: bool,
        fused: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One layer, its last addition left to the next one, which does it together with its norm.

        Args:
            x: (N, D), delta: (N, D) or None: the residual stream is their sum.
        Returns:
            x and delta (N, D) of the next layer (fused: delta may be wider), and the router's
            weights (B, E), (N, E) where it weighs tokens, None where there is no router.
        """
        experts = self.lora is not None and not base
        router = self.router if experts and weights is None else None
        run = self._fused if fused else self._plain
        return run(x, delta, batch, cos, sin, tasks, weights if experts else None, experts, router)

    def _plain(self, x, delta, batch, cos, sin, tasks, weights, experts: bool, router):
        x = x if delta is None else x + delta
        normed = self.input_layernorm(x)
        gates = None
        if router is not None and router.config.per_token:
            part = batch.part and batch.part.tokens
            weights = router(normed.to(self.scale.dtype), tasks[batch.sequence], part=part)
        elif router is not None:
            part = batch.part and batch.part.texts
            weights = router(segment_mean(normed, batch), tasks, part=part)
        if experts and weights is None:  # no router: every expert counts in full
            gates = self.scale[None]
        elif weights is not None:
            assert self.lora is not None
            columns = zip(weights.split(1, 1), self.lora.ranks, strict=True)
            gates = torch.cat([w.expand(-1, rank) for w, rank in columns], 1) * self.scale
            if router is None or not router.config.per_token:
                gates = per_token(gates, batch)  # (B, R) -> (N, R)
        x = x + self.self_attn(normed, batch, cos, sin, gates)
        return x, self.mlp(self.post_attention_layernorm(x), gates), weights

    def _fused(self, x, delta, batch, cos, sin, tasks, weights, experts: bool, router):
        attn, mlp, segments = self.self_attn, self.mlp, batch.segments
        per_token = router is not None and router.config.per_token
        x, normed, pooled = add_rmsnorm_pool(
            x,
            delta,
            self.input_layernorm.weight,
            self.input_layernorm.eps,
            segments,
            *attn.qkv.margins,
            pooled=router is not None and not per_token,
        )
        routing, part = None, batch.part and batch.part.texts
        if router is not None and per_token:
            tasks, part = tasks[batch.sequence], batch.part and batch.part.tokens
            # The kernel that shrinks for q, k and v finds the weights on its way.
            routing = router.in_kernel(tasks, part) if attn.qkv.adapted_names else None
            if routing is None:
                left = attn.qkv.margins[0]
                pooled = normed[:, left : left + x.shape[1]].float()
        if router is not None and routing is None:
            weights = router(pooled, tasks, fused=True, part=part)
        mode = TOKEN if per_token else TEXT if weights is not None else ALL if experts else None
        delta, weights = attn.fused(normed, batch, cos, sin, weights, mode, routing)
        norm = self.post_attention_layernorm
        x, normed, _ = add_rmsnorm_pool(
            x, delta, norm.weight, norm.eps, segments, *mlp.gate_up.margins
        )
        return x, mlp.fused(normed, batch, weights, mode), weights


class Decoder(nn.Module):
    """Token ids -> hidden states. Weights are zero until `model.weights.load_into` fills them.

    Args:
        lora: experts in every layer from `lora.first_layer` up; None for the bare base.
        router: weighs them; None: each expert counts with weight 1.
        dtype: of the base and of the activations.
        checkpointing: recompute each layer in the backward pass instead of storing it.
        fused: run the Triton kernels; see `kernels.choice`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        lora: LoRAConfig | None = None,
        router: RouterConfig | None = None,
        dtype: torch.dtype = torch.float32,
        checkpointing: bool = False,
        fused: bool = False,
    ):
        super().__init__()
        if lora is not None and not 0 <= lora.first_layer < config.num_hidden_layers:
            raise ValueError(
                f"experts from layer {lora.first_layer} up, but the model has layers "
                f"0 to {config.num_hidden_layers - 1}"
            )
        self.config, self.lora = config, lora
        self.checkpointing, self.fused = checkpointing, fused
        self.embed_tokens = nn.Embedding(
            config.vocab_size,
            config.hidden_size,
            _weight=torch.zeros(config.vocab_size, config.hidden_size, dtype=dtype),
            _freeze=True,
        )
        # By similarity the first routed layer, whose input is the base's, decides for all.
        self.routes_once = router is not None and router.kind in SIMILARITY
        self.layers = nn.ModuleList()
        for i in range(config.num_hidden_layers):
            mine = lora if lora is not None and i >= lora.first_layer else None
            gate = None
            first = mine is not None and i == mine.first_layer
            if mine is not None and router is not None and (first or not self.routes_once):
                gate = Router(config.hidden_size, mine.experts, router)
                gate = gate.double() if dtype == torch.float64 else gate
            self.layers.append(DecoderLayer(config, mine, gate, dtype))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)

    def drop_masters(self) -> None:
        """Free the experts' fp32 copies, for serving; see `LinearGroup.drop_masters`."""
        for module in self.modules():
            if isinstance(module, LinearGroup):
                module.drop_masters()

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
            (N, D) hidden states, and the weights of each routed layer: (B, E), or (N, E) where
            tokens are routed.
        """
        x = self.embed_tokens(batch.input_ids) if hidden is None else hidden
        if tasks is None:
            tasks = torch.zeros(len(batch.lengths), dtype=torch.int64, device=x.device)
        with _current(x.device):
            return self._run(
                x, batch, tasks, self.layers[first_layer:last_layer], weights, base,
                norm=last_layer is None,
            )  # fmt: skip

    def _run(self, x, batch, tasks, layers, weights, base: bool, norm: bool):
        # Kernels rotate in fp32, whatever the dtype.
        cos, sin = self.rope_table(batch, torch.float32 if self.fused else x.dtype)
        delta, routing = None, []
        for layer in layers:
            inputs = (x, delta, batch, cos, sin, tasks, weights, base, self.fused)
            if self.checkpointing and torch.is_grad_enabled():
                x, delta, used = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x, delta, used = layer(*inputs)
            if used is not None:
                routing.append(used)
            if self.routes_once and weights is None:
                weights = used
        if self.fused and norm:
            weight, eps = self.norm.weight, self.norm.eps
            return add_rmsnorm_pool(x, delta, weight, eps, batch.segments)[1], routing
        if delta is not None:
            x = x + delta[:, : x.shape[1]]
        return (self.norm(x) if norm else x), routing


def _current(device: torch.device):
    """Triton launches on the current card, which may be another one than the model's."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

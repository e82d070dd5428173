"""A layer of the decoder: attention and MLP with experts, the router, and the order of it all.

Shapes: B texts, N packed tokens, D hidden, H query heads, G key/value heads, K head size, E
experts, R total rank.
"""

import torch
from torch import Tensor, nn

from kernels.add_rmsnorm_pool import add_rmsnorm_pool
from kernels.attention import attention, packed_attention
from kernels.elementwise import rms_norm, rope, swiglu
from kernels.qk_norm_rope import qk_norm_rope
from kernels.shrink import ALL, TEXT, TOKEN
from kernels.swiglu import swiglu as fused_swiglu
from model.config import DecoderConfig
from model.lora import LinearGroup, LoRAConfig
from model.packed import Only, Packed, per_token, segment_mean
from model.router import Router


def _rows(of: Tensor | None, only: Only) -> Tensor | None:
    """The rows of gates or weights of some tokens; a single row is everybody's."""
    return of if of is None or len(of) == 1 else of[only.at]


def _weights(of: Tensor | None, mode: int | None, only: Only | None) -> Tensor | None:
    """The weights for some tokens: those of texts stay, since one of each text is left."""
    return of if only is None or mode != TOKEN else _rows(of, only)


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

    def forward(
        self, x: Tensor, batch: Packed, cos: Tensor, sin: Tensor, gates, only: Only | None = None
    ) -> Tensor:
        places = batch.places
        q, k, v = (t.unflatten(1, (-1, self.config.head_dim)) for t in self.qkv(x, gates, places))
        if self.config.model_type == "qwen3":
            q, k = self.q_norm(q), self.k_norm(k)  # (N, H, K), (N, G, K)
        q, k, v = map(batch.spread, (rope(q, cos, sin), rope(k, cos, sin), v))
        reach = {"causal": self.config.causal, "window": self.config.sliding_window}
        y = batch.gather(attention(q, k, v, batch.whole.groups, **reach))
        if only is not None:
            y, gates, places = y[only.at], _rows(gates, only), only.texts.places
        return self.o(y.flatten(1), gates, places)[0]

    def fused(
        self,
        normed: Tensor,
        batch: Packed,
        cos: Tensor,
        sin: Tensor,
        weights,
        mode: int | None,
        router,
        only: Only | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The same on wide buffers; and the weights, which a `router` of tokens finds in here."""
        c, segments, places = self.config, batch.segments, batch.places
        if router is None:
            y = self.qkv.fused(normed, segments, weights, mode, places)
        else:
            y, weights = self.qkv.routed(normed, segments, router, places)
        norms = (None, None)
        if c.model_type == "qwen3":
            norms = (self.q_norm.weight, self.k_norm.weight)
        shape = (c.num_attention_heads, c.num_key_value_heads, c.head_dim)
        q, k, v = map(batch.spread, qk_norm_rope(y, cos, sin, *norms, c.rms_norm_eps, *shape))
        reach = {"causal": c.causal, "window": c.sliding_window}
        y = batch.gather(packed_attention(q, k, v, batch.whole.segments, **reach))
        if only is not None:
            y, segments, places = y[only.at], only.texts.segments, only.texts.places
        own = _weights(weights, mode, only)
        return self.o.fused(y.flatten(1), segments, own, mode, places), weights


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig, lora: LoRAConfig | None, dtype: torch.dtype):
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.gate_up = LinearGroup(d, {"gate_proj": f, "up_proj": f}, lora, dtype)
        self.down = LinearGroup(f, {"down_proj": d}, lora, dtype)

    def forward(self, x: Tensor, gates: Tensor | None, places: Tensor | None = None) -> Tensor:
        gate, up = self.gate_up(x, gates, places)
        return self.down(swiglu(gate, up), gates, places)[0]

    def fused(
        self, normed: Tensor, batch: Packed, weights: Tensor | None, mode: int | None
    ) -> Tensor:
        """The same on wide buffers."""
        y = self.gate_up.fused(normed, batch.segments, weights, mode, batch.places)
        down = self.down.layout
        y = fused_swiglu(y, down.in_features, down.shape[1] - down.in_features)
        return self.down.fused(y, batch.segments, weights, mode, batch.places)


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
            scale = [s for s, r in zip(lora.scales, lora.ranks, strict=True) for _ in range(r)]
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
        only: Only | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One layer, its last addition left to the next one, which does it together with its norm.

        Args:
            x: (N, D), delta: (N, D) or None: the residual stream is their sum.
            only: one token of each text: no other goes on from the attention.
        Returns:
            x and delta (N, D) of the next layer (fused: delta may be wider), (B, D) with `only`,
            and the router's weights (B, E), (N, E) where it weighs tokens, None where there is no
            router.
        """
        experts = self.lora is not None and not base
        router = self.router if experts and weights is None else None
        run = self._fused if fused else self._plain
        weights = weights if experts else None
        return run(x, delta, batch, cos, sin, tasks, weights, experts, router, only)

    def _plain(self, x, delta, batch, cos, sin, tasks, weights, experts: bool, router, only):
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
        attended = self.self_attn(normed, batch, cos, sin, gates, only)
        if only is not None:
            x, gates, batch = x[only.at], _rows(gates, only), only.texts
        x = x + attended
        return x, self.mlp(self.post_attention_layernorm(x), gates, batch.places), weights

    def _fused(self, x, delta, batch, cos, sin, tasks, weights, experts: bool, router, only):
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
        delta, weights = attn.fused(normed, batch, cos, sin, weights, mode, routing, only)
        norm = self.post_attention_layernorm
        if only is not None:
            x, batch = x[only.at], only.texts
        x, normed, _ = add_rmsnorm_pool(
            x, delta, norm.weight, norm.eps, batch.segments, *mlp.gate_up.margins
        )
        return x, mlp.fused(normed, batch, _weights(weights, mode, only), mode), weights

"""The decoder: Qwen3, Mistral and Llama, on packed sequences, with experts and router inside.

Shapes as in `model.layers`. Parameter names are Hugging Face's, so loading needs no map.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.add_rmsnorm_pool import add_rmsnorm_pool
from model.config import DecoderConfig
from model.layers import DecoderLayer, RMSNorm
from model.lora import LinearGroup, LoRAConfig
from model.packed import Only, Packed
from model.router import SIMILARITY, Router, RouterConfig


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
        self.config, self.lora, self.router_config = config, lora, router
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

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Evaluation mode; nothing may write experts through `.data` (`LinearGroup.settle`)."""
        groups = [m for m in self.modules() if isinstance(m, LinearGroup) and m.adapted_names]
        training = self.training
        self.eval()
        for group in groups:
            group.settle(True)
        try:
            yield
        finally:
            for group in groups:
                group.settle(False)
            self.train(training)

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
            tensors |= layer_weights(layer, i)
        return tensors

    def rope_table(self, batch: Packed, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (N, K / 2) of position * theta^(-2i / K), scaled by `config.rope`."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        k = self.config.head_dim
        at = torch.arange(0, k, 2, device=batch.positions.device).to(wide)
        frequency = 1.0 / self.config.rope_theta ** (at / k)
        if self.config.rope is not None:
            frequency = self.config.rope.scale(frequency)
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
        only: Only | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the layers first_layer <= i < last_layer on a packed batch.

        Args:
            batch: B texts, N tokens. For a trie B and N are those of the whole texts; all must have
                one task, and gradients, which would add up in no fixed order, are not to be taken.
            tasks: (B,) int64 index into `router.TASKS`; 0 for all where None.
            hidden: what enters `first_layer`, a row for each token that is in the batch: (N, D), of
                a trie (M, D); None: the embedded tokens.
            last_layer: stop before this layer and skip the final norm; None: run to the end.
            weights: (B, E), used instead of every router's.
            base: leave experts and routers out.
            only: the token of each text that is wanted: in the last layer no other goes on from the
                attention.
        Returns:
            (N, D) hidden states, (B, D) with `only`, and the weights of each routed layer: (B, E),
            or (N, E) where tokens are routed.
        """
        x = self.embed_tokens(batch.input_ids) if hidden is None else hidden
        if tasks is None:
            tasks = torch.zeros(len(batch.whole.lengths), dtype=torch.int64, device=x.device)
        end = len(self.layers) if last_layer is None else last_layer
        with _current(x.device):
            return self._run(
                x, batch, tasks, range(first_layer, end), weights, base, only,
                norm=last_layer is None,
            )  # fmt: skip

    def trie_layers(self, weights: Tensor | None = None, base: bool = False) -> int:
        """How many layers, from the first, run on a trie of texts: those in which a token's state
        depends on what precedes it alone. A router that weighs whole texts ends them, and so do
        `weights` of texts."""
        if not self.config.causal:
            return 0
        if base or self.lora is None:
            return len(self.layers)
        c = self.router_config
        alike = c is None or c.per_token or c.kind in ("task", "uniform")
        return len(self.layers) if alike and weights is None else self.lora.first_layer

    def _run(self, x, batch, tasks, layers: range, weights, base: bool, only, norm: bool):
        # Kernels rotate in fp32, whatever the dtype.
        angles = torch.float32 if self.fused else x.dtype
        cos, sin = self.rope_table(batch, angles)
        delta, routing = None, []
        common = self.trie_layers(weights, base) if batch.trie else 0
        for i in layers:
            if batch.trie and (i >= common or (only is not None and i == layers[-1])):
                x, delta, batch = _whole(x, delta, batch)
                cos, sin = self.rope_table(batch, angles)
            layer, read = self.layers[i], only if i == layers[-1] else None
            own = tasks[:1].expand(len(batch.lengths)) if batch.trie else tasks
            inputs = (x, delta, batch, cos, sin, own, weights, base, self.fused, read)
            if self.checkpointing and torch.is_grad_enabled():
                x, delta, used = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x, delta, used = layer(*inputs)
            if used is not None:
                routing.append(self._routing(used, batch))
            if self.routes_once and weights is None:
                weights = used
        x, delta, batch = _whole(x, delta, batch)
        if self.fused and norm:
            weight, eps = self.norm.weight, self.norm.eps
            segments = batch.segments if only is None else only.texts.segments
            return add_rmsnorm_pool(x, delta, weight, eps, segments)[1], routing
        if delta is not None:
            x = x + delta[:, : x.shape[1]]
        return (self.norm(x) if norm else x), routing

    def _routing(self, weights: Tensor, batch: Packed) -> Tensor:
        """The weights of a layer for the whole texts, (B, E) or (N, E)."""
        if batch.trie is None:
            return weights
        if self.router_config is not None and self.router_config.per_token:
            return weights[batch.trie.rows]
        return weights[:1].expand(len(batch.whole.lengths), -1)  # one task, and so one row


def layer_weights(layer: DecoderLayer, index: int) -> dict[str, Tensor]:
    """As `Decoder.named_weights`, of the layer that a checkpoint has at `index`."""
    prefix, attn, tensors = f"model.layers.{index}.", layer.self_attn, {}
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


def _whole(x: Tensor, delta: Tensor | None, batch: Packed):
    """x, delta and batch of the whole texts."""
    return batch.spread(x), None if delta is None else batch.spread(delta), batch.whole


def _current(device: torch.device):
    """Triton launches on the current card, which may be another one than the model's."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

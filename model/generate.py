"""Greedy and sampled decoding by the bare base of a model, with a key-value cache.

The generator is the resident base with its experts left out, so one set of weights embeds, reranks
and generates; what a model that stops at an early layer lacks of its base is added. Shapes: B
texts, T tokens of the longest, H query and G key/value heads, K head size.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import attention
from kernels.elementwise import rope
from model import bases, weights
from model.config import DecoderConfig, ModelConfig
from model.layers import Attention, DecoderLayer
from model.packed import Packed, pack
from model.transformer import layer_weights
from model.unimoer import UniMoER


class KeyValueCache:
    """Rotated keys and values of each layer, (B, room, G, K), and how many each text has."""

    def __init__(self, config: DecoderConfig, texts: int, room: int, like: Tensor):
        c = config
        shape = (c.num_hidden_layers, texts, room, c.num_key_value_heads, c.head_dim)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.lengths = torch.zeros(texts, dtype=torch.int64, device=like.device)
        self.longest = 0  # of the lengths, known without asking the card

    def fill(self, layer: int, k: Tensor, v: Tensor, batch: Packed) -> None:
        """Write the prompts' k and v (N, G, K)."""
        for into, rows in ((self.keys, k), (self.values, v)):
            into[layer, batch.sequence, batch.positions] = rows

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write one token's k and v (B, G, K) of each text, behind what it has."""
        rows = torch.arange(len(self.lengths), device=k.device)
        self.keys[layer, rows, self.lengths] = k
        self.values[layer, rows, self.lengths] = v

    def seen(self, window: int | None) -> Tensor:
        """(B, T) which places of the cache one new token of each text looks at, itself included."""
        at = torch.arange(self.longest + 1, device=self.lengths.device)
        seen = at <= self.lengths[:, None]
        return seen if window is None else seen & (at > self.lengths[:, None] - window)

    def attend(self, layer: int, q: Tensor, seen: Tensor) -> Tensor:
        """One new token's q (B, H, K) over what it sees: (B, H, K)."""
        k, v = (t[layer, :, : seen.shape[1]].transpose(1, 2) for t in (self.keys, self.values))
        # The query heads that share a key stand in the place of H tokens: no key is repeated.
        grouped = q.unflatten(1, (k.shape[1], -1))  # (B, G, H / G, K)
        mask = seen[:, None, None]
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).flatten(1, 2)


def _heads(attn: Attention, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (N, H, K), k and v (N, G, K) of the base, rotated."""
    q, k, v = (t.unflatten(1, (-1, attn.config.head_dim)) for t in attn.qkv(x, None))
    if attn.config.model_type == "qwen3":
        q, k = attn.q_norm(q), attn.k_norm(k)
    return rope(q, cos, sin), rope(k, cos, sin), v


def _rest(layer: DecoderLayer, x: Tensor, y: Tensor) -> Tensor:
    """The layer behind its attention: y (N, H, K)."""
    x = x + layer.self_attn.o(y.flatten(1), None)[0]
    return x + layer.mlp(layer.post_attention_layernorm(x), None)


def choose(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The next token of each text (B,) from logits (B, V): the highest at temperature 0, else
    drawn from softmax(logits / temperature) cut to the `top_k` likeliest (0: all), then to the
    smallest set with probability `top_p` (arXiv 1904.09751)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort()
        out = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        out[:, -1] = False  # the likeliest always stays
        logits = logits.masked_fill(out.scatter(1, order, out), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def require_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raise ValueError for what `choose` cannot draw by."""
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(
            "expected temperature >= 0, 0 < top_p <= 1 and top_k >= 0; "
            f"got {temperature}, {top_p}, {top_k}"
        )


def require_causal(config: ModelConfig) -> Path:
    """The folder of a model's base, if the model can generate.

    Raises:
        ValueError: it is not causal.
    """
    if not config.causal:
        raise ValueError("generation needs a causal base, but this model has causal=False")
    return bases.resolve(config.base, config.revision)


class Generator:
    """The whole base of a model, which continues texts.

    What the model has of it is used where it is, the experts left out. What it lacks is read from
    disk and held here: the layers behind its last (`ModelConfig.layers`), an output matrix that is
    not the embeddings.

    Attributes:
        head: (V, D). added: the tensors that are held here.
    Raises:
        ValueError: as `require_causal`, `bases.resolve` and `weights.load_into`.
    """

    def __init__(self, model: UniMoER):
        folder = require_causal(model.config)
        self.config, self.decoder = DecoderConfig.read(folder), model.decoder
        self.device, had = model.device, len(model.decoder.layers)
        self.head = model.decoder.embed_tokens.weight
        with torch.device(self.device):
            behind = [
                DecoderLayer(self.config, None, None, model.dtype)
                for _ in range(had, self.config.num_hidden_layers)
            ]
        targets: dict[str, Tensor] = {}
        for i, layer in enumerate(behind, had):
            targets |= layer_weights(layer, i)
        if not self.config.tie_word_embeddings:
            self.head = targets["lm_head.weight"] = torch.empty_like(self.head)
        if targets:
            weights.load_into(folder, targets, ignore=lambda name: name not in targets)
        self.added = list(targets.values())
        self.layers = [*model.decoder.layers, *behind]

    def prefill(self, batch: Packed, cache: KeyValueCache) -> Tensor:
        """Final hidden states (B, D) of the last token of each prompt; fills the cache."""
        x = self.decoder.embed_tokens(batch.input_ids)
        cos, sin = self.decoder.rope_table(batch, x.dtype)
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            q, k, v = _heads(layer.self_attn, layer.input_layernorm(x), cos, sin)
            cache.fill(i, k, v, batch)
            y = attention(q, k, v, batch.groups, causal=True, window=self.config.sliding_window)
            if i + 1 == len(self.layers):  # no other token is read
                x, y = x[batch.last], y[batch.last]
            x = _rest(layer, x, y)
        cache.lengths += torch.tensor(batch.lengths, device=x.device)
        cache.longest = max(batch.lengths)
        return self.decoder.norm(x)

    def decode(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """Final hidden states (B, D) of one new token of each text, (B,); the cache grows by it."""
        x = self.decoder.embed_tokens(tokens)
        # As a batch of B texts of one token, each at its own place.
        rows = torch.arange(len(tokens), device=x.device)
        batch = Packed(tokens, cache.lengths, rows, rows, (1,) * len(tokens), [(len(tokens), 1)])
        cos, sin = self.decoder.rope_table(batch, x.dtype)
        seen = cache.seen(self.config.sliding_window)
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            q, k, v = _heads(layer.self_attn, layer.input_layernorm(x), cos, sin)
            cache.append(i, k, v)
            x = _rest(layer, x, cache.attend(i, q, seen))
        cache.lengths += 1
        cache.longest += 1
        return self.decoder.norm(x)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        stop: Collection[int] = (),
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> list[list[int]]:
        """Continue each prompt.

        Args:
            prompts: token ids, none empty.
            stop: tokens that end a text; the first one is its last token.
            temperature: 0 for greedy decoding. top_k, top_p: as `choose`.
            seed: of the draws; None: PyTorch's own random state.
        Returns:
            the new tokens of each text, at most `max_new_tokens`.
        Raises:
            ValueError: an option out of its range, an empty prompt.
        """
        require_sampling(temperature, top_k, top_p)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        random = None
        if seed is not None:
            random = torch.Generator(self.device).manual_seed(seed)
        batch = pack(prompts, self.device)
        room = max(batch.lengths) + max_new_tokens
        cache = KeyValueCache(self.config, len(prompts), room, self.head)
        hidden = self.prefill(batch, cache)
        made: list[list[int]] = [[] for _ in prompts]
        going = set(range(len(prompts)))
        for step in range(max_new_tokens):
            logits = (hidden @ self.head.t()).float()
            tokens = choose(logits, temperature, top_k, top_p, random)
            for text, token in enumerate(tokens.tolist()):
                if text in going:
                    made[text].append(token)
                    if token in stop:
                        going.discard(text)
            if not going or step + 1 == max_new_tokens:
                break
            hidden = self.decode(tokens, cache)
        return made

"""Greedy and sampled decoding by the bare base of a model, with a key-value cache.

The generator is the resident base with its experts left out, so one set of weights embeds, reranks
and generates. Shapes: B texts, T tokens of the longest, H query and G key/value heads, K head size.
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
from model.transformer import Decoder
from model.unimoer import UniMoER


class KeyValueCache:
    """Rotated keys and values of each layer, (B, room, G, K), and how many each text has."""

    def __init__(self, decoder: Decoder, texts: int, room: int):
        c, like = decoder.config, decoder.embed_tokens.weight
        shape = (len(decoder.layers), texts, room, c.num_key_value_heads, c.head_dim)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.lengths = torch.zeros(texts, dtype=torch.int64, device=like.device)

    def fill(self, layer: int, k: Tensor, v: Tensor, batch: Packed) -> None:
        """Write the prompts' k and v (N, G, K)."""
        for into, rows in ((self.keys, k), (self.values, v)):
            into[layer, batch.sequence, batch.positions] = rows

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write one token's k and v (B, G, K) of each text, behind what it has."""
        rows = torch.arange(len(self.lengths), device=k.device)
        self.keys[layer, rows, self.lengths] = k
        self.values[layer, rows, self.lengths] = v

    def attend(self, layer: int, q: Tensor, window: int | None) -> Tensor:
        """One new token's q (B, H, K) over its own text, itself included: (B, H, K)."""
        room = int(self.lengths.max()) + 1
        k, v = (t[layer, :, :room].transpose(1, 2) for t in (self.keys, self.values))
        at = torch.arange(room, device=q.device)
        seen = at <= self.lengths[:, None]
        if window is not None:
            seen &= at > self.lengths[:, None] - window
        repeat = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)  # (B, H, T, K)
        mask = seen[:, None, None]
        return F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask)[:, :, 0]


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


def prefill(decoder: Decoder, batch: Packed, cache: KeyValueCache) -> Tensor:
    """Final hidden states (B, D) of the last token of each prompt; fills the cache."""
    c = decoder.config
    x = decoder.embed_tokens(batch.input_ids)
    cos, sin = decoder.rope_table(batch, x.dtype)
    for i, layer in enumerate(decoder.layers):
        assert isinstance(layer, DecoderLayer)
        q, k, v = _heads(layer.self_attn, layer.input_layernorm(x), cos, sin)
        cache.fill(i, k, v, batch)
        y = attention(q, k, v, batch.groups, causal=True, window=c.sliding_window)
        if i + 1 == len(decoder.layers):  # no other token is read
            x, y = x[batch.last], y[batch.last]
        x = _rest(layer, x, y)
    cache.lengths += torch.tensor(batch.lengths, device=x.device)
    return decoder.norm(x)


def decode(decoder: Decoder, tokens: Tensor, cache: KeyValueCache) -> Tensor:
    """Final hidden states (B, D) of one new token of each text, (B,); the cache grows by it."""
    x = decoder.embed_tokens(tokens)
    # As a batch of B texts of one token, each at its own place.
    rows = torch.arange(len(tokens), device=x.device)
    batch = Packed(tokens, cache.lengths, rows, rows, (1,) * len(tokens), [(len(tokens), 1)])
    cos, sin = decoder.rope_table(batch, x.dtype)
    for i, layer in enumerate(decoder.layers):
        assert isinstance(layer, DecoderLayer)
        q, k, v = _heads(layer.self_attn, layer.input_layernorm(x), cos, sin)
        cache.append(i, k, v)
        x = _rest(layer, x, cache.attend(i, q, decoder.config.sliding_window))
    cache.lengths += 1
    return decoder.norm(x)


def require_whole(config: ModelConfig) -> Path:
    """The folder of a model's base, if the model can generate.

    Raises:
        ValueError: layers of the base were cut off, or it is not causal.
    """
    folder = bases.resolve(config.base, config.revision)
    whole = DecoderConfig.read(folder).num_hidden_layers
    layers = config.layers or whole
    if layers < whole or not config.causal:
        raise ValueError(
            f"generation needs the whole causal base, but this model has {layers} of {whole} "
            f"layers and causal={config.causal}"
        )
    return folder


def output_matrix(model: UniMoER) -> Tensor:
    """(V, D): the embeddings where the base ties them, else its `lm_head.weight`, read from disk.

    Raises:
        ValueError: as of `require_whole`.
    """
    folder = require_whole(model.config)
    table = model.decoder.embed_tokens.weight
    if model.decoder.config.tie_word_embeddings:
        return table
    head = torch.empty_like(table)
    weights.load_into(
        folder, {"lm_head.weight": head}, ignore=lambda name: name != "lm_head.weight"
    )
    return head


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


@torch.no_grad()
def generate(
    model: UniMoER,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    stop: Collection[int] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    head: Tensor | None = None,
) -> list[list[int]]:
    """Continue each prompt by the bare base, the experts left out.

    Args:
        prompts: token ids, none empty.
        stop: tokens that end a text; the first one is its last token.
        temperature: 0 for greedy decoding. top_k, top_p: as `choose`.
        seed: of the draws; None: PyTorch's own random state.
        head: `output_matrix(model)`, kept by who generates more than once: it may come from disk.
    Returns:
        the new tokens of each text, at most `max_new_tokens`.
    Raises:
        ValueError: as `output_matrix`; an option out of its range, an empty prompt.
    """
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0 or max_new_tokens < 1:
        raise ValueError(
            "generate: expected temperature >= 0, 0 < top_p <= 1, top_k >= 0, max_new_tokens >= 1; "
            f"got {temperature}, {top_p}, {top_k}, {max_new_tokens}"
        )
    decoder, head = model.decoder, output_matrix(model) if head is None else head
    generator = None
    if seed is not None:
        generator = torch.Generator(model.device).manual_seed(seed)
    batch = pack(prompts, model.device)
    cache = KeyValueCache(decoder, len(prompts), max(batch.lengths) + max_new_tokens)
    hidden = prefill(decoder, batch, cache)
    made: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    for step in range(max_new_tokens):
        tokens = choose((hidden @ head.t()).float(), temperature, top_k, top_p, generator)
        for text, token in enumerate(tokens.tolist()):
            if text in going:
                made[text].append(token)
                if token in stop:
                    going.discard(text)
        if not going or step + 1 == max_new_tokens:
            break
        hidden = decode(decoder, tokens, cache)
    return made

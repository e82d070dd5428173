"""The shapes that are measured: Hugging Face's config.json of each base, without its weights."""

from pathlib import Path

from model.config import DecoderConfig


def _qwen3(hidden: int, ff: int, layers: int, heads: int, tied: bool) -> DecoderConfig:
    return DecoderConfig("qwen3", hidden, ff, layers, heads, 8, 128, 151936, 1e-6, 1e6, tied)


SHAPES = {
    "smollm2-135m": DecoderConfig("llama", 576, 1536, 30, 9, 3, 64, 49152, 1e-5, 1e5, True),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, False),
    "mistral-7b": DecoderConfig("mistral", 4096, 14336, 32, 32, 8, 128, 32768, 1e-5, 1e6, False),
}

HUB = {  # hub id -> its shape
    "Qwen/Qwen3-0.6B-Base": "qwen3-0.6b",
    "Qwen/Qwen3-1.7B-Base": "qwen3-1.7b",
    "Qwen/Qwen3-4B-Base": "qwen3-4b",
    "Qwen/Qwen3-8B-Base": "qwen3-8b",
    "mistralai/Mistral-7B-v0.3": "mistral-7b",
}


def shape_of(base: str) -> DecoderConfig:
    """The shape of a base of the study, by its hub id or a name above, or of a local folder.

    Raises:
        ValueError: neither; nothing is downloaded.
    """
    if (name := HUB.get(base, base)) in SHAPES:
        return SHAPES[name]
    if not (Path(base) / "config.json").is_file():
        raise ValueError(
            f"base {base!r}: its shape is not known; expected one of {', '.join([*SHAPES, *HUB])}, "
            "or a folder with the config.json of another"
        )
    return DecoderConfig.read(Path(base))


def parameters(shape: DecoderConfig) -> int:
    """Of the base: embeddings (twice where the output matrix is its own), layers, norms."""
    d, k = shape.hidden_size, shape.head_dim
    q, kv = shape.num_attention_heads * k, shape.num_key_value_heads * k
    norms = 2 * d + (2 * k if shape.model_type == "qwen3" else 0)
    layer = d * (2 * q + 2 * kv) + 3 * d * shape.intermediate_size + norms
    tables = 1 if shape.tie_word_embeddings else 2
    return tables * shape.vocab_size * d + shape.num_hidden_layers * layer + d


def lora_parameters(shape: DecoderConfig) -> int:
    """Of one unit of rank on all seven projections of all layers."""
    d, k, f = shape.hidden_size, shape.head_dim, shape.intermediate_size
    q, kv = shape.num_attention_heads * k, shape.num_key_value_heads * k
    return shape.num_hidden_layers * ((d + q) * 2 + (d + kv) * 2 + (d + f) * 3)

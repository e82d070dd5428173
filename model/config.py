"""The shape of a decoder, from Hugging Face's config.json, and of a whole UniMoER."""

import math
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import bases
from model.files import read_json
from model.heads import check_pooling
from model.lora import LoRAConfig
from model.router import SIMILARITY, RouterConfig
from model.tokens import Prompts
from model.weights import AGAIN

FAMILIES = ("qwen3", "mistral", "llama")


@dataclass(frozen=True)
class Llama3Rope:
    """The frequencies of Llama 3.1 for texts longer than those it began with, as transformers'
    `_compute_llama3_parameters` has them; the names are those of config.json."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def scale(self, frequency: Tensor) -> Tensor:
        """Of frequencies (K / 2): those that turned less than low_freq_factor times in the original
        length become slower by factor, those above high_freq_factor stay, others lie between."""
        turns = self.original_max_position_embeddings * frequency / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequency * (kept + (1 - kept) / self.factor)


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
    rope: Llama3Rope | None = None

    @classmethod
    def read(cls, folder: Path, layers: int | None = None, causal: bool = True) -> "DecoderConfig":
        """From `folder`/config.json, keeping the first `layers` layers (None: all).

        Raises:
            ValueError: a family, activation, bias or RoPE scaling that is not implemented here, a
                key that is missing, or more layers than there are.
        """
        path = folder / "config.json"
        raw = read_json(path, AGAIN)
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
            ("quantization_config", raw.get("quantization_config"), None),
        ):
            if found != expected:
                raise ValueError(f"{path}: {name} is {found!r}, only {expected!r} is implemented")
        if rope_type not in ("default", "llama3"):
            raise ValueError(
                f"{path}: rope type is {rope_type!r}, only 'default' and 'llama3' are implemented"
            )
        if raw["model_type"] == "qwen3" and raw.get("use_sliding_window", False):
            raise ValueError(f"{path}: use_sliding_window of Qwen3 is not implemented")
        # As transformers has it: 4,096 where Mistral's key is absent; Llama has none.
        window = raw.get("sliding_window", 4096) if raw["model_type"] == "mistral" else None
        try:
            heads, rope = raw["num_attention_heads"], None
            if rope_type == "llama3":
                rope = Llama3Rope(**{f.name: rope_parameters[f.name] for f in fields(Llama3Rope)})
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
                rope=rope,
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

    def unused(self, name: str) -> bool:
        """Whether a checkpoint's tensor has no place in the decoder, by right: layers that were cut
        off, the output matrix, a projector, which is the head's (`listwise.own_projector`)."""
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= self.num_hidden_layers:
            return True
        return (
            name == "lm_head.weight"
            or name.endswith("rotary_emb.inv_freq")
            or (name.startswith("projector."))
        )


DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


LISTWISE = ("interaction", "pseudo_query")  # what scores a query's candidates together
HEADS = ("linear", "yes_no", *LISTWISE)


@dataclass(frozen=True)
class ModelConfig:
    """Everything that rebuilds a model, except its trained tensors.

    base, revision: see `bases.resolve`. layers: only the first n; None: all.
    embedding_pooling, reranking_pooling: last, mean, or first. rerank_head: one of HEADS.
    document_tokens: longer documents lose their end. end_token: "" takes the base's own.
    lora None: the bare base. router None: every expert counts in full.
    """

    base: str = bases.DEFAULT
    revision: str | None = None
    layers: int | None = None
    causal: bool = True
    dtype: str = "float32"
    embedding_pooling: str = "last"
    reranking_pooling: str = "last"
    rerank_head: str = "linear"
    document_tokens: int = 512
    list_tokens: int = 8192
    end_token: str = ""
    prompts: Prompts = Prompts()
    lora: LoRAConfig | None = None
    router: RouterConfig | None = None
    checkpointing: bool = False

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {self.dtype!r}")
        if self.rerank_head not in HEADS:
            raise ValueError(f"rerank_head must be one of {HEADS}, got {self.rerank_head!r}")
        similar = self.router is not None and self.router.kind in SIMILARITY
        if self.rerank_head == "interaction" and similar:
            raise ValueError(
                "routing by similarity compares a text with training texts, and there are none for "
                "lists: use another router with rerank_head='interaction'"
            )
        r = self.router
        by_task = r is not None and (similar or r.kind == "task" or r.task_prior)
        if self.rerank_head == "pseudo_query" and by_task:
            raise ValueError(
                "with rerank_head='pseudo_query' all texts are embedded, so routing by task (or "
                "task_prior) or by similarity would leave the reranking expert idle: use another"
            )
        if self.lora is None and self.router is not None:
            raise ValueError("a router weighs experts, and lora=None has none: set router=None too")
        check_pooling(self.embedding_pooling, self.causal)
        check_pooling(self.reranking_pooling, self.causal)

    @property
    def listwise(self) -> bool:
        """Whether a query's candidates are scored together, by cosines, not pair by pair."""
        return self.rerank_head in LISTWISE

    @classmethod
    def from_json(cls, raw: dict) -> "ModelConfig":
        raw = dict(raw, prompts=Prompts(**raw["prompts"]))
        if raw["lora"] is not None:
            lora: dict[str, Any] = raw["lora"]
            lora = {k: tuple(v) if isinstance(v, list) else v for k, v in lora.items()}
            raw["lora"] = LoRAConfig(**lora)
        if raw["router"] is not None:
            raw["router"] = RouterConfig(**raw["router"])
        return cls(**raw)

"""A tiny GGUF file as llama.cpp's converter would write it, and texts for its tokenizer."""

import gguf
import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

from model import bases

HIDDEN, HEADS, KV, HEAD, FF, LAYERS = 32, 4, 2, 8, 64, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "1 2"]
TOKENS = SPECIAL + sorted(ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES]
TEXTS = [
    "the the  the\n\tthe",
    "In 2012, 12 + 12 = 24.",
    "def f(x): return x**2  # ünïcödé 漢字 🙂 \u200d\x00",
    "<|im_start|>user\nthe<|im_end|><|endoftext|> the",
    "",
]


def permute(weight, heads):
    """What llama.cpp's converter does to q and k, row by row: row i + j K/2 goes to 2 i + j."""
    out = np.empty_like(weight)
    size = len(weight) // heads
    for head in range(heads):
        for i in range(size // 2):
            for j in range(2):
                out[head * size + 2 * i + j] = weight[head * size + i + j * size // 2]
    return out


SHAPES = {
    "input_layernorm": (HIDDEN,),
    "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
    "self_attn.k_proj": (KV * HEAD, HIDDEN),
    "self_attn.v_proj": (KV * HEAD, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
    "post_attention_layernorm": (HIDDEN,),
    "mlp.gate_proj": (FF, HIDDEN),
    "mlp.up_proj": (FF, HIDDEN),
    "mlp.down_proj": (HIDDEN, FF),
}


def truth():
    """Hugging Face names -> float32 values that float16 holds exactly."""
    g = np.random.default_rng(0)
    shapes = {"model.embed_tokens": (len(TOKENS), HIDDEN), "model.norm": (HIDDEN,)}
    for i in range(LAYERS):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in SHAPES.items()}
    return {
        f"{name}.weight": (g.integers(-127, 128, shape) / 64).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_gguf(path, values=None, arch="llama", extra=None):
    """A GGUF file as llama.cpp's converter would write it, the embedding quantized to Q8_0."""
    writer = gguf.GGUFWriter(path, arch)
    kinds = [3 if token in SPECIAL else 1 for token in TOKENS]  # 3 is llama.cpp's "control"
    meta = {"block_count": LAYERS, "context_length": 128, "embedding_length": HIDDEN}
    meta |= {"feed_forward_length": FF, "head_count": HEADS, "head_count_kv": KV}
    meta |= {"rope_freq_base": 1e5, "rope_dimension_count": HEAD, "layer_norm_rms_eps": 1e-5}
    meta |= {"tokenizer_model": "gpt2", "tokenizer_pre": "smollm", "token_list": TOKENS}
    meta |= {"token_types": kinds, "token_merges": MERGES, "bos_token_id": 1}
    meta |= {"eos_token_id": 2, "unk_token_id": 0, "pad_token_id": 2}
    for name, value in meta.items():
        getattr(writer, f"add_{name}")(value)
    theirs = {name: other for other, name in bases.GGUF_NAMES.items()}
    for name, value in (values or truth()).items():
        layer = name.removeprefix("model.layers.").split(".")[0]
        inner = name.startswith("model.layers.")
        prefix = f"model.layers.{layer}." if inner else ""
        stem = theirs[name.removeprefix(prefix).removesuffix(".weight")]
        if stem in ("attn_q", "attn_k"):
            value = permute(value, HEADS if stem == "attn_q" else KV)
        kind = gguf.GGMLQuantizationType.Q8_0 if stem == "token_embd" else None
        if kind:
            value = gguf.quants.quantize(value, kind)
        writer.add_tensor(f"blk.{layer}." * inner + f"{stem}.weight", value, raw_dtype=kind)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

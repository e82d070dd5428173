"""What several test files share: tiny random bases in Hugging Face's own format."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

# Tiny tensors on a shared machine: threads would mostly wait for each other. Child processes
# inherit it, so what they compute can be compared bit for bit.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# Without a card Triton's interpreter runs the kernels. It is asked for before a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the same bits on every run


def patch_the_language_once() -> None:
    """Triton's interpreter puts its own functions into the language at every launch and at every
    call of an inner function, and takes them out again: a quarter of these tests' time. In a
    process that only interprets they can stay."""
    from triton import language  # after the variable that it reads
    from triton.runtime import interpreter

    first, done = interpreter._patch_lang, set()

    def patch(kernel):
        seen = set(map(id, kernel.__globals__.values()))
        if (key := (id(language) in seen, id(language.core) in seen)) not in done:
            done.add(key)
            first(kernel)
        return interpreter._LangPatchScope()  # with nothing to restore

    interpreter._patch_lang = patch


if os.environ.get("TRITON_INTERPRET") == "1":
    patch_the_language_once()

# Files that take a minute or more, each on one worker: begun first, they leave none idle at last.
LONG = (
    "run/test_resumed.py", "run/test_run.py", "train/test_parallel.py", "model/test_fused.py",
    "bench/test_bench.py", "run/test_study.py", "model/test_trie.py", "kernels/test_fused.py",
    "eval/test_calibration.py", "analysis/test_representation.py", "eval/test_rag.py",
    "analysis/test_overview.py", "eval/test_stdlib.py", "eval/test_benchmarks.py",
    "bench/test_compiled.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    root = Path(__file__).parent
    if gone := [name for name in LONG if not (root / name).is_file()]:
        raise pytest.UsageError(f"LONG in {__file__} names what is not there: {', '.join(gone)}")

    def place(item: pytest.Item) -> int:
        path = item.path.relative_to(root).as_posix()
        return LONG.index(path) if path in LONG else len(LONG)

    items.sort(key=place)  # stable


@pytest.fixture(autouse=True)
def the_same_draws_in_any_order() -> None:
    """What a test draws without a generator of its own does not hang on which tests ran before."""
    torch.manual_seed(0)


END = "<|endoftext|>"
# "yes", "no" and ".</" come often enough to become single tokens; the others give some merges.
LINES = ["yes", "no", ".</"] * 50 + [
    "Query: what is the capital of France?",
    "Document: The capital of France is Paris, on the Seine.",
    "def read(path): return the text of the file, or None.",
]
CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


def _tokenizer() -> Tokenizer:
    """A byte-level BPE of about 300 tokens; what it has never seen becomes bytes."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[AddedToken(END, special=True, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def _tensors(config: dict, seed: int) -> dict[str, torch.Tensor]:
    """Random weights that keep activations near 1, under Hugging Face's names."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    def norm(features: int) -> torch.Tensor:
        return 1 + 0.2 * torch.randn(features, generator=generator)

    d, f, k = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * k, config["num_key_value_heads"] * k
    tensors = {
        "model.embed_tokens.weight": torch.randn(config["vocab_size"], d, generator=generator),
        "model.norm.weight": norm(d),
    }
    for i in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm": norm(d),
            "post_attention_layernorm": norm(d),
            "self_attn.q_proj": matrix(q, d),
            "self_attn.k_proj": matrix(kv, d),
            "self_attn.v_proj": matrix(kv, d),
            "self_attn.o_proj": matrix(d, q),
            "mlp.gate_proj": matrix(f, d),
            "mlp.up_proj": matrix(f, d),
            "mlp.down_proj": matrix(d, f),
        }
        if config["model_type"] == "qwen3":
            layer |= {"self_attn.q_norm": norm(k), "self_attn.k_norm": norm(k)}
        tensors |= {f"model.layers.{i}.{name}.weight": t for name, t in layer.items()}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(config["vocab_size"], d)
    return tensors


@pytest.fixture(scope="session")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_base(seed=0, **config): a new folder with config.json, weights and tokenizer.

    It is a Llama of 4 layers, hidden 32, unless `config` overrides a key of config.json.
    """
    tokenizer = _tokenizer()

    def make(seed: int = 0, **overrides: object) -> Path:
        folder = tmp_path_factory.mktemp("base")
        config = {**CONFIG, "vocab_size": tokenizer.get_vocab_size(), **overrides}
        (folder / "config.json").write_text(json.dumps(config))
        save_file(_tensors(config, seed), folder / "model.safetensors", {"format": "pt"})
        tokenizer.save(str(folder / "tokenizer.json"))
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_base(make_base: Callable[..., Path]) -> Path:
    """The one tiny base that most tests use; nobody writes into its folder."""
    return make_base()

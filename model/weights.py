"""Safetensors in and out: checkpoints are read straight into preallocated buffers.

A checkpoint is a folder with one `model.safetensors`, or with several shards and a
`model.safetensors.index.json`. The file format is a little-endian u64 with the header's length,
a JSON header {name: {dtype, shape, data_offsets}}, then the bytes of the tensors
(https://github.com/huggingface/safetensors#format). The header is checked against the file's
real size before anything is allocated or read, and pickle is never opened.
"""

import hashlib
import json
import math
import mmap
import os
import re
import struct
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from model.files import sync

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ALONE = ("embed_tokens.", "layers.", "norm.")  # how names begin where a decoder is stored alone

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# The format itself limits headers to 100 MB, which also bounds what a hostile file can make us read
MAX_HEADER = 100_000_000
AGAIN = "download or copy it again"
SHOWN = 10  # how many names an error spells out

# What people put where a safetensors file should be, by its first bytes
FOREIGN = (
    (b"version https://git-lfs", "a git-lfs pointer: run `git lfs pull` in its repository"),
    (b"PK\x03\x04", "a zip or PyTorch pickle, which is not read: convert it to safetensors"),
    (b"\x80", "a Python pickle, which is not read: convert it to safetensors"),
    (b"GGUF", "a GGUF file: give a folder with safetensors"),
    (b"<", "an HTML or XML page, perhaps a failed download: download it again"),
)


class TensorInfo(NamedTuple):
    """One entry of a header: the dtype as the format spells it ("BF16"), the shape, and the first
    and one-past-last byte of the data, counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes, shapes and places of the tensors of one safetensors file, in file order.

    Reads the header alone. Raises ValueError that names the file, what was found in it and what
    to do, if it is missing, truncated, longer than its header says, or not safetensors at all.
    """
    return _parse(path)[0]


def read_metadata(path: Path) -> dict[str, str]:
    """The free text of a file's header (`__metadata__`), {} if it has none. Raises like
    `read_header`."""
    return _parse(path)[1]


def save(
    tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors (any device, any strides, dtypes kept) to one safetensors file.

    The file appears whole or not at all: it is written under a temporary name in the same folder,
    synced, then renamed. `metadata` is stored as text in the header (`read_metadata`).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # one name, so what a kill leaves is taken
    temporary.touch()
    mode = temporary.stat().st_mode  # what the user's umask allows; save_file makes it private
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        try:
            save_file(plain, temporary, metadata)
        except SafetensorError as error:  # of its own for every failure, a full disk too
            found = re.search(r"\(os error (\d+)\)", str(error))
            if found is None:
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


@torch.no_grad()
def draw_into(parameter: torch.Tensor, fill: Callable[[torch.Tensor], object]) -> None:
    """Initialise a parameter with values drawn on the CPU, so a seed means the same everywhere."""
    values = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
    fill(values)
    parameter.copy_(values)


def load_into(
    folder: Path,
    targets: Mapping[str, torch.Tensor],
    *,
    ignore: Callable[[str], bool] = lambda name: False,
) -> None:
    """Copy every tensor of a checkpoint folder into its preallocated target, in place.

    A target may be any view (strided, transposed), dtype and device: values are converted while
    they are copied out of the mapped file, one tensor at a time, and the mapping is dropped after
    each, so peak memory is the model plus one tensor. Everything is checked before the first
    copy: names and shapes must agree exactly.

    `ignore` excuses names that the checkpoint has and the model does not need (layers that were
    cut off, `lm_head.weight` of a tied model, `inv_freq` buffers). It never excuses a target.

    Raises one ValueError that lists what is missing, unexpected or misshapen with both shapes and
    the file; a ValueError that names the file if one is truncated, foreign or absent, or if a
    value does not fit the target's dtype (bf16 reaches 3e38, fp16 65504).
    """
    folder = Path(folder)
    found = checkpoint(folder)
    problems = []
    for name in targets.keys() - found.keys():
        problems.append(f"missing: {name} {tuple(targets[name].shape)}")
    for name, (path, info) in found.items():
        if name not in targets:
            if not ignore(name):
                problems.append(f"unexpected: {name} {info.shape} in {path.name}")
            continue
        target = targets[name]
        assert not target.is_meta, f"{name} is on the meta device: nothing would be copied"
        if tuple(target.shape) != info.shape:
            problems.append(
                f"shape: {name} is {info.shape} in {path.name}, the model has {tuple(target.shape)}"
            )
        elif info.dtype not in DTYPES or (
            DTYPES[info.dtype].is_floating_point != target.dtype.is_floating_point
        ):
            problems.append(
                f"dtype: {name} is {info.dtype} in {path.name}, which is not converted to "
                f"{target.dtype}"
            )
    if problems:
        problems.sort()
        kinds = [list(of) for _, of in groupby(problems, lambda problem: problem.split(":")[0])]
        shown = [problem for of in kinds for problem in of[: SHOWN // len(kinds)]]
        more = f"\n  and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
        raise ValueError(
            f"the checkpoint {folder} does not fit the model ({len(problems)} differences; is it "
            "the model that config.json describes?):\n  " + "\n  ".join(shown) + more
        )
    # In file order, so that a cold disk is read once from front to back
    wanted = [(path, info.begin, name) for name, (path, info) in found.items() if name in targets]
    for path, _, name in sorted(wanted):
        _copy(path, name, found[name][1], targets[name])


@torch.no_grad()
def copy_exactly(
    tensors: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor], source: str
) -> None:
    """Copy tensors into the targets of the same names, in place.

    Raises one ValueError that lists the names that are missing or unexpected and the shapes that
    differ, before anything is copied.
    """
    problems = [f"missing: {name}" for name in targets.keys() - tensors.keys()]
    problems += [f"unexpected: {name}" for name in tensors.keys() - targets.keys()]
    problems += [
        f"shape: {name} is {tuple(tensors[name].shape)}, expected {tuple(targets[name].shape)}"
        for name in targets.keys() & tensors.keys()
        if targets[name].shape != tensors[name].shape
    ]
    if problems:
        raise ValueError(f"{source} does not fit the model:\n  " + "\n  ".join(sorted(problems)))
    if broken := [name for name in sorted(targets) if not tensors[name].isfinite().all()]:
        raise ValueError(
            f"{source} has values that are not finite in {', '.join(broken[:SHOWN])}: its training "
            "has failed, or the file is damaged"
        )
    for name, target in targets.items():
        target.copy_(tensors[name])


def fingerprint(folder: Path) -> str:
    """A cheap sha256 of a checkpoint: of every tensor its file, header entry and 4 KiB from its
    middle, so that other weights of the same shapes differ too. Raises like `checkpoint`."""
    digest = hashlib.sha256()
    for name, (path, info) in sorted(checkpoint(Path(folder)).items()):
        digest.update(f"{path.name} {name} {info.dtype} {info.shape} {info.begin}\n".encode())
        with open(path, "rb") as file:
            file.seek(max(info.begin, (info.begin + info.end) // 2 - 2048))
            digest.update(file.read(min(4096, info.end - info.begin)))
    return digest.hexdigest()


def checkpoint(folder: Path) -> dict[str, tuple[Path, TensorInfo]]:
    """Where each tensor of a checkpoint folder lies: name -> (file, entry). Reads headers alone;
    raises ValueError if a file is absent, truncated or foreign, or the index contradicts it.

    The names are those of a whole model, also for a decoder that was stored alone, whose names
    lack the `model.` (Qwen3-Embedding)."""
    found = _stored(folder)
    if "embed_tokens.weight" not in found:
        return found
    return {f"model.{n}" if n.startswith(ALONE) else n: at for n, at in found.items()}


def _stored(folder: Path) -> dict[str, tuple[Path, TensorInfo]]:
    """`checkpoint` by the names that the files have."""
    if (folder / SINGLE).is_file():
        path = folder / SINGLE
        return {name: (path, info) for name, info in read_header(path).items()}
    index = folder / INDEX
    if not index.is_file():
        raise ValueError(f"no {SINGLE} and no {INDEX} in {folder}; {_instead(folder)}")
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is not an index ({type(error).__name__}: {error}); expected JSON with a "
            '"weight_map" of tensor names to file names: download it again'
        ) from error
    outside = [name for name in shards if Path(name).name != name]
    if outside:
        raise ValueError(f"{index} names {outside[0]!r}, which is not a file beside the index")
    absent = [name for name in shards if not (folder / name).is_file()]
    if absent:
        raise ValueError(
            f"{index} names {len(shards)} shards, of which {len(absent)} are not there: "
            f"{', '.join(absent[:SHOWN])}; the download is incomplete, run it again"
        )
    headers = {name: read_header(folder / name) for name in shards}
    found: dict[str, tuple[Path, TensorInfo]] = {}
    for shard, header in headers.items():
        for name, info in header.items():
            # A tensor that the index places elsewhere (or nowhere) still counts as present
            if weight_map.get(name, shard) == shard:
                found[name] = (folder / shard, info)
    astray = [name for name, shard in weight_map.items() if name not in headers[shard]]
    if astray:
        raise ValueError(
            f"{index} places {astray[0]} in {weight_map[astray[0]]}, which does not have it "
            f"({len(astray)} such names): index and shards are of different versions"
        )
    return found


def _instead(folder: Path) -> str:
    """What a folder without a checkpoint holds, and what to do about it."""
    if not folder.is_dir():
        return "that folder does not exist"
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if Path(name).suffix in {".bin", ".pth", ".pt", ".ckpt"}]
    if pickles:
        return (
            f"{', '.join(pickles[:3])} is a pickle, which can run code and is not read: "
            "use a revision with safetensors, or convert it"
        )
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        return f"{', '.join(shards[:3])} alone does not say which tensors belong to the model"
    return f"it has {', '.join(names[:SHOWN]) or 'nothing'}"


def _parse(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(32)
            for magic, what in FOREIGN:
                # A header shorter than 60 bytes could begin with "<" as its length: look further
                if start.startswith(magic) and start[8:9] != b"{":
                    raise ValueError(f"{path} is not safetensors but {what}")
            if size < 8:
                raise ValueError(f"{path} has {size} bytes, too few for safetensors: {AGAIN}")
            length = struct.unpack("<Q", start[:8])[0]
            if length > MAX_HEADER or start[8:9] not in (b"{", b""):
                raise ValueError(f"{path} is not safetensors: it begins with {start[:16]!r}")
            if length > size - 8:
                raise ValueError(
                    f"{path} is truncated: its header needs {length + 8} bytes, "
                    f"the file has {size}; {AGAIN}"
                )
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        entries = json.loads(raw)
        metadata = dict(entries.pop("__metadata__", {}))
        infos = {
            str(name): TensorInfo(
                str(entry["dtype"]),
                tuple(int(n) for n in entry["shape"]),
                8 + length + int(entry["data_offsets"][0]),
                8 + length + int(entry["data_offsets"][1]),
            )
            for name, entry in entries.items()
        }
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} has a damaged safetensors header ({type(error).__name__}: {error}); {AGAIN}"
        ) from error
    position = 8 + length
    for name, info in sorted(infos.items(), key=lambda item: (item[1].begin, item[1].end)):
        itemsize = DTYPES[info.dtype].itemsize if info.dtype in DTYPES else None
        numel = math.prod(info.shape)
        span = info.end - info.begin
        if info.begin != position or span < 0 or any(n < 0 for n in info.shape):
            raise ValueError(f"{path} has a damaged header: {name} lies at {info}; {AGAIN}")
        if itemsize is not None and span != numel * itemsize:
            raise ValueError(
                f"{path} has a damaged header: {name} {info.shape} {info.dtype} needs "
                f"{numel * itemsize} bytes and has {span}; {AGAIN}"
            )
        position = info.end
    if position != size:
        how = "truncated" if size < position else "too long"
        raise ValueError(
            f"{path} is {how}: its header describes {position} bytes, the file has {size}; {AGAIN}"
        )
    return infos, metadata


@torch.no_grad()
def _copy(path: Path, name: str, info: TensorInfo, target: torch.Tensor) -> None:
    if target.numel() == 0:
        return
    dtype = DTYPES[info.dtype]
    # A mapping per tensor: its pages leave our memory as soon as the tensor is copied. Private
    # (copy-on-write), because torch warns about buffers that it could not write to.
    page = info.begin - info.begin % mmap.ALLOCATIONGRANULARITY
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), info.end - page, access=mmap.ACCESS_COPY, offset=page)
    offset = info.begin - page
    if offset % dtype.itemsize:  # old writers did not align the data: move one tensor
        mapped, offset = bytearray(memoryview(mapped)[offset:]), 0
    source = torch.frombuffer(mapped, dtype=dtype, count=math.prod(info.shape), offset=offset)
    target.copy_(source.view(info.shape))
    if dtype.is_floating_point and torch.finfo(dtype).max > torch.finfo(target.dtype).max:
        low, high = torch.aminmax(target)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(
                f"{name} in {path} ({info.dtype}) has values that {target.dtype} cannot hold: "
                "load it as bfloat16 or float32"
            )


def revision(folder: Path | str) -> str:
    """Of a checkpoint: 16 digits of a sha256 over the files of `save_pretrained`; of where its base
    lies, if that is a whole path, the last part.

    Raises ValueError if one is missing.
    """
    digest = hashlib.sha256()
    for name in ("config.json", "adapters.safetensors", "heads.safetensors"):
        path = Path(folder) / name
        if not path.is_file():
            raise ValueError(f"{path} is missing: expected a folder written by save_pretrained")
        content = path.read_bytes()
        if name == "config.json":
            content = re.sub(rb'("base": ")/[^"]*/', rb"\1", content)
        digest.update(content)
    return digest.hexdigest()[:16]

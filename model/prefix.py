"""What enters the first adapted layer, computed once per text and kept on disk.

Below `first_layer` nothing is trained, so a text's states there are the same for every arm, seed
and step. They are computed in batches that depend on the list of texts alone and rounded to the
stored dtype, so a run ends with the same numbers whether the file was there or had to be made.
"""

import fcntl
import hashlib
import json
import mmap
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model import processor
from model.files import write_json
from model.packed import Packed, common_lengths, pack, pack_trie
from model.token_lists import TokenLists
from model.transformer import Decoder

TokenIds = Sequence[Sequence[int]]
# Of the work, that a trie has to save: its batches mix lengths, so that attention takes a call for
# each text, where equally long neighbours share one.
TRIE_SAVES = 0.05


def token_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices sorted by length, cut into batches of at most `budget` tokens (or one text)."""
    return cut(sorted(range(len(lengths)), key=lambda i: (lengths[i], i)), lengths, budget)


def cut(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """In this order, in runs of at most `budget` tokens (or one text); no empty ones."""
    batches, size = [[]], 0
    for i in order:
        if batches[-1] and size + lengths[i] > budget:
            batches.append([])
            size = 0
        batches[-1].append(i)
        size += lengths[i]
    return [batch for batch in batches if batch]


LIMIT = 8 << 30  # bytes on disk, of the cache and of what is held for one list of texts


class Mapped:
    """A file of int16 (tokens, D), memory-mapped; `release` gives its pages back.

    The pages stay in the system's cache, so reading them again costs no disk, but they no longer
    count as this process's memory.
    """

    def __init__(self, path: Path | str, shape: tuple[int, int], new: bool = False):
        with open(path, "r+b" if new else "rb") as file:
            if new:
                try:  # taken now: a disk that is full later would kill us in the midst of a write
                    os.posix_fallocate(file.fileno(), 0, 2 * shape[0] * shape[1])
                except OSError as error:
                    raise ValueError(
                        f"{path}: no room for {2 * shape[0] * shape[1] / 1e6:,.0f} MB of states "
                        f"({error.strerror}): free some, set UNIMOER_CACHE (with --no-prefix-cache "
                        "TMPDIR) to another disk, or run with --set prefix=false"
                    ) from error
            access = mmap.ACCESS_WRITE if new else mmap.ACCESS_READ
            self.pages = mmap.mmap(file.fileno(), 0, access=access)
        self.array = np.frombuffer(self.pages, np.int16).reshape(shape)

    def release(self) -> None:
        self.pages.madvise(mmap.MADV_DONTNEED)  # shared pages: what was written is kept

    def checksum(self) -> int:
        found = zlib.crc32(self.pages)
        self.release()
        return found


class PrefixStates:
    """States (sum of lengths, D) of a list of texts before layer `first_layer`, memory-mapped.

    16-bit models store their own dtype, so nothing is rounded; wider ones store fp16.
    """

    def __init__(self, states: Mapped, lengths: Sequence[int], dtype: torch.dtype):
        self.states, self.dtype = states, dtype
        self.starts = np.concatenate(([0], np.cumsum(lengths)))

    def rows(self, texts: Sequence[int], dtype: torch.dtype) -> Tensor:
        """(N, D) of the given texts, one after the other."""
        parts = [self.states.array[self.starts[i] : self.starts[i + 1]] for i in texts]
        copied = np.concatenate(parts)
        self.states.release()
        return torch.from_numpy(copied).view(self.dtype).to(dtype)


MODULES = ("config", "layers", "lora", "packed", "transformer")  # of this folder, behind a state


@cache
def _code() -> str:
    """A hash of the modules that the states come from: after a change they are made again."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    own = [root / "model" / f"{name}.py" for name in MODULES]
    for path in [*sorted((root / "kernels").glob("*.py")), *own]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _stored_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float16


@torch.no_grad()
def _compute(
    decoder: Decoder,
    ids: TokenIds,
    first_layer: int,
    out: Mapped,
    starts: np.ndarray,
    budget: int,
    advance: Callable[[int], object],
    below: tuple[int, PrefixStates] | None = None,
) -> None:
    """below: (layer, states) to go on from, where they were computed for a lower layer."""
    stored = _stored_dtype(decoder.embed_tokens.weight.dtype)
    device = decoder.embed_tokens.weight.device
    for batch in token_batches([len(text) for text in ids], budget):
        first, given = 0, None
        if below is not None:
            first, given = below[0], below[1].rows(batch, stored).to(device)
        packed = pack([ids[i] for i in batch], device)
        hidden, _ = decoder(
            packed, hidden=given, first_layer=first, last_layer=first_layer, base=True
        )
        bits = hidden.to(stored).cpu()
        if not bits.isfinite().all():
            raise ValueError(
                f"states before layer {first_layer} exceed {stored} (largest "
                f"{hidden.abs().max().item():.0f}): run with dtype bfloat16 or prefix off"
            )
        rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in batch])
        out.array[rows] = bits.view(torch.int16).numpy()
        out.release()
        advance(len(rows))


def fingerprint(ids: TokenIds) -> str:
    """sha256 of the texts' lengths and token ids, in their order."""
    digest = hashlib.sha256()
    for text in ids:
        digest.update(np.asarray([len(text), *text], dtype=np.int32).tobytes())
    return digest.hexdigest()


def prefix_states(
    decoder: Decoder,
    ids: TokenIds,
    identity: str,
    folder: Path | None,
    *,
    budget: int = 4096,
    limit_bytes: int = LIMIT,
    advance: Callable[[int], object] = lambda tokens: None,
) -> PrefixStates:
    """The states of `ids` before the decoder's first adapted layer.

    Where the cache has them for a lower layer and nothing was rounded there, it goes on from these:
    the states of a ladder of depths cost what the deepest costs.

    Args:
        identity: of the base's weights; with the layer, dtype and token ids it names the file.
        folder: of the cache; None computes into a file that vanishes with the process.
        budget: tokens of one batch; part of the key, since rounding depends on it.
        limit_bytes: the cache's bound on disk; the least recently used files go first. What is
            larger than that is not kept.
        advance: told how many tokens are done, for a progress bar.
    """
    assert decoder.lora is not None
    first_layer = decoder.lora.first_layer
    weight = decoder.embed_tokens.weight
    lengths = [len(text) for text in ids]
    shape = (sum(lengths), decoder.config.hidden_size)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    stored = _stored_dtype(weight.dtype)
    if 2 * shape[0] * shape[1] > limit_bytes:
        folder = None
    place = f"{weight.dtype} {_machine(weight.device)} {decoder.fused} {decoder.config.causal}"
    texts = f"{identity} {place} {budget} {torch.__version__} {_code()} {fingerprint(ids)}"

    def key_of(layer: int) -> str:
        return hashlib.sha256(f"{layer} {texts}".encode()).hexdigest()

    def find(layer: int) -> PrefixStates | None:
        if folder is None:
            return None
        found = _open(folder / f"{key_of(layer)[:32]}.states", shape, key_of(layer))
        return None if found is None else PrefixStates(found, lengths, stored)

    if (cached := find(first_layer)) is not None:
        advance(shape[0])
        return cached
    key, name, below = key_of(first_layer), key_of(first_layer)[:32], None
    if stored == weight.dtype:
        lower = ((layer, find(layer)) for layer in range(first_layer - 1, 0, -1))
        below = next(((layer, at) for layer, at in lower if at is not None), None)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        _evict(folder, limit_bytes - 2 * shape[0] * shape[1])
    handle, path = tempfile.mkstemp(prefix=f"{name}.", suffix=".part", dir=folder)
    try:
        with suppress(OSError):  # of a file system that has no locks
            fcntl.flock(handle, fcntl.LOCK_EX)  # until this process is done with it, or is gone
        out = Mapped(path, shape, new=True)
        if folder is None:
            os.unlink(path)  # the mapping stays readable until it is dropped, or we are killed
        _compute(decoder, ids, first_layer, out, starts, budget, advance, below)
        if folder is not None:
            out.pages.flush()
            header = {"key": key, "crc32": out.checksum(), "shape": shape}
            note = folder / f"{name}.json"
            # The note goes first: a states file without its note is never believed.
            write_json(note, header, f".{os.getpid()}")  # another process may build the same
            os.chmod(path, note.stat().st_mode)  # as the umask has it: others may share the cache
            os.replace(path, folder / f"{name}.states")
    finally:
        os.close(handle)
        Path(path).unlink(missing_ok=True)
    return PrefixStates(out, lengths, stored)


def _machine(device: torch.device) -> str:
    """What rounds alike: a card by its name, a CPU by that and the instructions that are used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {processor.name()} {torch.backends.cpu.get_cpu_capability()}"


def _open(path: Path, shape: tuple[int, int], key: str) -> Mapped | None:
    """The cached states, or None where they are absent, damaged or another list's."""
    try:
        with suppress(OSError):  # another user's, who shares the cache; one that is only read
            os.utime(path)  # first: what is in use is not evicted by another process
        note, size = path.with_suffix(".json").read_bytes(), path.stat().st_size
    except FileNotFoundError:
        return None
    try:
        header = json.loads(note)
    except ValueError:
        header = {}
    expected = {"key": key, "shape": list(shape)}
    if isinstance(header, dict) and {k: header.get(k) for k in expected} == expected:
        if size == 2 * shape[0] * shape[1]:
            try:
                states = Mapped(path, shape)
            except FileNotFoundError:  # evicted since
                return None
            if states.checksum() == header.get("crc32"):
                return states
    print(f"{path}: damaged, made again")
    return None


def _evict(folder: Path, keep_bytes: int) -> None:
    """Remove the least recently used files until at most `keep_bytes` are left."""
    found = {}
    for path in [*folder.glob("*.states"), *folder.glob("*.part")]:
        with suppress(FileNotFoundError):  # another process finished or evicted it
            found[path] = path.stat()
    for path, of in list(found.items()):
        age = time.time() - of.st_mtime
        # A minute, as its maker makes it and then locks it; a day where locks tell nothing.
        if path.suffix == ".part" and age > 60 and (age > 24 * 3600 or _abandoned(path)):
            with suppress(PermissionError):
                path.unlink(missing_ok=True)
                del found[path]
    total = sum(of.st_size for of in found.values())
    files = (path for path in found if path.suffix == ".states")
    for path in sorted(files, key=lambda path: found[path].st_mtime):
        if total <= keep_bytes:
            return
        with suppress(PermissionError):  # another user's, in a folder where each keeps his own
            path.unlink(missing_ok=True)
            path.with_suffix(".json").unlink(missing_ok=True)
            total -= found[path].st_size


def _abandoned(path: Path) -> bool:
    """Whether the process that made a file of states is gone: it would hold its lock."""
    try:
        with open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or another user's
        return False
    return True


class TextSet:
    """Tokenized texts, with their frozen-prefix states where those are used."""

    def __init__(self, ids: TokenIds, states: PrefixStates | None = None):
        if isinstance(ids, TokenLists):
            self.ids, self.lengths = ids, ids.lengths
        else:  # as lists, which have an order (`batches`)
            self.ids = [row if isinstance(row, list) else list(row) for row in ids]
            self.lengths = [len(text) for text in ids]
        self.states = states

    def batches(self, budget: int, depth: float = 0.0) -> tuple[list[list[int]], bool]:
        """Indices of batches, each sorted by length, of at most `budget` tokens (or one text); and
        whether to make a trie of each (`pack_trie`).

        depth: what part of the network runs on the trie. Texts that begin alike go together, where
        that saves TRIE_SAVES of the work.
        """
        by_length = token_batches(self.lengths, budget)
        if self.states is not None or not depth:
            return by_length, False
        batches = cut(sorted(range(len(self.ids)), key=self.ids.__getitem__), self.lengths, budget)
        saved = sum(sum(common_lengths(self.ids, batch)) for batch in batches)
        if depth * saved <= TRIE_SAVES * sum(self.lengths):
            return by_length, False
        return [sorted(batch, key=self.lengths.__getitem__) for batch in batches], True

    def batch(
        self, texts: Sequence[int], device: torch.device, dtype: torch.dtype, trie: bool = False
    ) -> tuple[Packed, Tensor | None]:
        """The packed batch of some texts and, with states, what enters the first adapted layer."""
        packed = (pack_trie if trie else pack)([self.ids[i] for i in texts], device)
        if self.states is None:
            return packed, None
        return packed, self.states.rows(texts, dtype).to(device)

"""Frozen-prefix states: the same numbers with and without the file, whatever happened to it."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import prefix
from model.lora import LinearGroup, LoRAConfig
from model.packed import pack
from model.prefix import PrefixStates, TextSet, prefix_states, token_batches
from model.router import RouterConfig
from model.transformer import Decoder
from model.unimoer import ModelConfig, UniMoER

ROOT = Path(__file__).resolve().parents[2]
FIRST = 2
LORA = LoRAConfig(("a", "b"), (2, 3), (4.0, 6.0), first_layer=FIRST)
TEXTS = ["Paris", "the capital of France", "yes", "", "def read(path): return the text", "no no"]


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> UniMoER:
    return make_model(tiny_base)


def make_model(base: Path, dtype: str = "float32", first: int = FIRST) -> UniMoER:
    lora = LoRAConfig(LORA.experts, LORA.ranks, LORA.alphas, first_layer=first)
    made = UniMoER(ModelConfig(base=str(base), lora=lora, router=RouterConfig(), dtype=dtype))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for group in made.modules():
            if isinstance(group, LinearGroup):
                for b in group.lora_B.values():
                    b.copy_(0.3 * torch.randn(b.shape, generator=generator))
    return made


@pytest.fixture(scope="module")
def ids(model: UniMoER) -> list[list[int]]:
    return model.tokenizer.documents(TEXTS)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that states are computed and not read."""
    calls: list[int] = []
    original = prefix._compute

    def count(*args, **kwargs) -> None:
        calls.append(1)
        original(*args, **kwargs)

    monkeypatch.setattr(prefix, "_compute", count)
    return calls


def all_rows(states: PrefixStates, dtype: torch.dtype = torch.float32) -> Tensor:
    return states.rows(range(len(TEXTS)), dtype)


def build(
    model: UniMoER, ids: list[list[int]], folder: Path | None, identity: str = "x", **options
) -> PrefixStates:
    return prefix_states(model.decoder, ids, identity, folder, **options)


def states_file(folder: Path) -> Path:
    (path,) = folder.glob("*.states")
    return path


# The same numbers ----------------------------------------------------------------------------


def test_no_cold_and_warm_cache_give_the_same_bits(
    model: UniMoER, ids: list[list[int]], tmp_path: Path, computed: list[int]
) -> None:
    without = all_rows(build(model, ids, None))
    cold = all_rows(build(model, ids, tmp_path / "cache"))
    warm = all_rows(build(model, ids, tmp_path / "cache"))
    assert len(computed) == 2, "the third is read"
    assert without.abs().max() > 1
    assert torch.equal(without, cold) and torch.equal(cold, warm)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_are_what_enters_the_first_adapted_layer(tiny_base: Path, dtype: str) -> None:
    """Up to fp16's rounding for a float32 model; a 16-bit model keeps its own numbers."""
    model = make_model(tiny_base, dtype)
    ids = model.tokenizer.documents(TEXTS)
    states = build(model, ids, None, budget=16)
    with torch.no_grad():
        for i, text in enumerate(ids):
            entering, _ = model.decoder(pack([text]), last_layer=FIRST, base=True)
            rows = states.rows([i], model.dtype)
            assert rows.shape == entering.shape and rows.dtype == model.dtype
            # Alone and in a batch the products may add up in another order
            eps = {"float32": 2**-11, "bfloat16": 2**-7, "float16": 2**-9}[dtype]
            torch.testing.assert_close(rows, entering, rtol=eps, atol=eps)
    order = [4, 0, 4]
    expected = torch.cat([states.rows([i], model.dtype) for i in order])
    assert torch.equal(states.rows(order, model.dtype), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-3), ("bfloat16", 0.02)])
def test_results_equal_those_without_states(tiny_base: Path, dtype: str, tolerance: float) -> None:
    """Vectors, scores, and the gradients of the experts."""
    model = make_model(tiny_base, dtype)
    ids = model.tokenizer.documents(TEXTS)
    plain, cached = TextSet(ids), TextSet(ids, build(model, ids, None))
    for f in (model.embed_all, model.score_all):
        torch.testing.assert_close(
            f(cached, budget=30), f(plain, budget=30), rtol=0, atol=tolerance
        )
    gradients = []
    for texts in (plain, cached):
        batch, states = texts.batch([0, 2, 4], model.device, model.dtype)
        model.zero_grad()
        vectors, _ = model.embed(batch, states)
        vectors.square()[:, :8].sum().backward()
        grads = [p.grad for p in model.trained().values() if p.grad is not None]
        gradients.append(torch.cat([g.flatten() for g in grads]))
    error = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert error < 10 * tolerance


def test_a_base_without_frozen_layers(tiny_base: Path) -> None:
    """Experts from layer 0 up: the states are the embedded tokens."""
    model = make_model(tiny_base, first=0)
    ids = model.tokenizer.documents(TEXTS)
    tokens = torch.tensor([i for text in ids for i in text])
    rows = all_rows(build(model, ids, None))
    assert torch.equal(rows, model.decoder.embed_tokens(tokens).half().float())


def test_states_that_fp16_cannot_hold(make_base: Callable[..., Path]) -> None:
    model = make_model(make_base())
    with torch.no_grad():
        model.decoder.embed_tokens.weight.mul_(1e5)
    with pytest.raises(ValueError, match="exceed torch.float16.*dtype bfloat16"):
        build(model, model.tokenizer.documents(TEXTS), None)


def test_advance_counts_every_token_once(
    model: UniMoER, ids: list[list[int]], tmp_path: Path
) -> None:
    total = sum(map(len, ids))
    for steps in (2, 1):  # cold in several batches, warm at once
        told: list[int] = []
        build(model, ids, tmp_path, budget=total // 2 + 1, advance=told.append)
        assert sum(told) == total and len(told) >= steps


# What names a file ---------------------------------------------------------------------------


def test_other_inputs_are_other_files(
    tiny_base: Path, model: UniMoER, ids: list[list[int]], tmp_path: Path, computed: list[int]
) -> None:
    """Base, layer, dtype, budget, ids and their division into texts."""
    build(model, ids, tmp_path)
    joined = [ids[0] + ids[1], *ids[2:]]
    for made, texts, identity, budget in (
        (model, ids, "another base", 4096),
        (model, ids, "x", 1000),
        (model, ids[::-1], "x", 4096),
        (model, joined, "x", 4096),
        (make_model(tiny_base, first=1), ids, "x", 4096),
        (make_model(tiny_base, "bfloat16"), ids, "x", 4096),
    ):
        before = len(computed)
        build(made, texts, tmp_path, identity, budget=budget)
        assert len(computed) == before + 1
    assert len(list(tmp_path.glob("*.states"))) == 7


# Files that are not what they were -----------------------------------------------------------


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def note_of_another(path: Path) -> None:
    note = path.with_suffix(".json")
    note.write_text(json.dumps(json.loads(note.read_text()) | {"key": "0" * 64}))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "one bit": flipped,
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 2),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0\0"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "note of another list": note_of_another,
    "note cut short": lambda path: os.truncate(path.with_suffix(".json"), 20),
    "note not text": lambda path: path.with_suffix(".json").write_bytes(b"\xff\xfe\x00"),
    "note another JSON": lambda path: path.with_suffix(".json").write_text("[1, 2]"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_made_again(
    model: UniMoER,
    ids: list[list[int]],
    tmp_path: Path,
    computed: list[int],
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    good = all_rows(build(model, ids, tmp_path))
    path = states_file(tmp_path)
    DAMAGE[name](path)
    assert torch.equal(all_rows(build(model, ids, tmp_path)), good)
    assert len(computed) == 2
    assert str(path) in capsys.readouterr().out, "the user is told"
    assert torch.equal(all_rows(build(model, ids, tmp_path)), good)
    assert len(computed) == 2, "what was made again is good"


@pytest.mark.parametrize("suffix", [".states", ".json"])
def test_half_a_pair_is_not_believed(
    model: UniMoER, ids: list[list[int]], tmp_path: Path, computed: list[int], suffix: str
) -> None:
    good = all_rows(build(model, ids, tmp_path))
    states_file(tmp_path).with_suffix(suffix).unlink()
    assert torch.equal(all_rows(build(model, ids, tmp_path)), good)
    assert len(computed) == 2


def test_an_interrupted_build_leaves_nothing(
    model: UniMoER, ids: list[list[int]], tmp_path: Path
) -> None:
    def interrupt(tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(model, ids, tmp_path, advance=interrupt)
    assert list(tmp_path.iterdir()) == []


CHILD = """
import os, signal, sys
from pathlib import Path
from model import prefix
from model.lora import LoRAConfig
from model.unimoer import ModelConfig, UniMoER

base, folder, when = sys.argv[1:]
lora = LoRAConfig(("a", "b"), (2, 3), (4.0, 6.0), first_layer=2)
model = UniMoER(ModelConfig(base=base, lora=lora))
replace = os.replace

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

def die_at_the_states(source, target):
    die() if str(target).endswith(".states") else replace(source, target)

os.replace = die_at_the_states
advance = die if when == "computing" else lambda tokens: None
ids = model.tokenizer.documents({texts!r})
prefix.prefix_states(model.decoder, ids, "x", Path(folder), budget=16, advance=advance)
"""


@pytest.mark.parametrize("when", ["computing", "renaming"])
def test_a_killed_build_is_not_believed(
    tiny_base: Path,
    model: UniMoER,
    ids: list[list[int]],
    tmp_path: Path,
    computed: list[int],
    when: str,
) -> None:
    """SIGKILL after the first batch, or between the renaming of the note and of the states."""
    code = CHILD.format(texts=TEXTS)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_base), str(tmp_path), when], cwd=ROOT, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert list(tmp_path.glob("*.part")) and not list(tmp_path.glob("*.states"))
    found = all_rows(build(model, ids, tmp_path, budget=16))
    assert len(computed) == 1
    assert torch.equal(found, all_rows(build(model, ids, None, budget=16)))


# From a lower layer --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_states_go_on_from_those_of_the_highest_lower_layer(
    tiny_base: Path, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as from the first layer on, and only the layers between are run."""
    ran: list[tuple[int, int]] = []
    forward = Decoder.forward

    def watched(self, *args, **kwargs):
        ran.append((kwargs["first_layer"], kwargs["last_layer"]))
        return forward(self, *args, **kwargs)

    models = {first: make_model(tiny_base, dtype, first) for first in (1, 2, 3)}
    ids = models[1].tokenizer.documents(TEXTS)
    for first in (1, 2):
        build(models[first], ids, tmp_path, budget=16)
    monkeypatch.setattr(Decoder, "forward", watched)
    onwards = all_rows(build(models[3], ids, tmp_path, budget=16), models[3].dtype)
    assert set(ran) == {(2, 3)}
    scratch = all_rows(build(models[3], ids, None, budget=16), models[3].dtype)
    assert set(ran) == {(2, 3), (0, 3)}
    assert torch.equal(onwards, scratch)


def test_rounded_states_are_not_gone_on_from(
    tiny_base: Path, tmp_path: Path, computed: list[int]
) -> None:
    """A float32 model's are stored in fp16: the cache would change the numbers."""
    low, high = (make_model(tiny_base, "float32", first) for first in (1, 3))
    ids = low.tokenizer.documents(TEXTS)
    build(low, ids, tmp_path)
    with_cache, without = (all_rows(build(high, ids, at)) for at in (tmp_path, None))
    assert torch.equal(with_cache, without)


# The bound on disk ---------------------------------------------------------------------------


def test_eviction_keeps_the_bound(
    model: UniMoER, ids: list[list[int]], tmp_path: Path, computed: list[int]
) -> None:
    """The least recently used goes first, its note with it."""
    size = 2 * sum(map(len, ids)) * model.decoder.config.hidden_size
    limit = 3 * size - 1  # room for two

    def use(identity: str, at: float) -> None:
        before = set(tmp_path.glob("*.states"))
        build(model, ids, tmp_path, identity, limit_bytes=limit)
        for path in set(tmp_path.glob("*.states")) - before:
            os.utime(path, (at, at))

    now = time.time()
    use("a", now - 300)
    use("b", now - 200)
    use("a", now)  # read: now it is the younger one
    assert len(computed) == 2
    use("c", now + 1)
    assert sum(p.stat().st_size for p in tmp_path.glob("*.states")) == 2 * size <= limit
    assert len(list(tmp_path.iterdir())) == 4
    assert len(computed) == 3
    use("a", now)
    assert len(computed) == 3, "a was used after b, so b went"
    use("b", now)
    assert len(computed) == 4


def test_states_in_use_survive_their_file(
    model: UniMoER, ids: list[list[int]], tmp_path: Path
) -> None:
    states = build(model, ids, tmp_path)
    expected = all_rows(states)
    size = 2 * len(expected) * expected.shape[1]
    build(model, ids, tmp_path, "another", limit_bytes=size)  # there is room for one
    assert len(list(tmp_path.glob("*.states"))) == 1
    assert torch.equal(all_rows(states), expected)


def test_what_is_larger_than_the_cache_is_not_kept(
    model: UniMoER, ids: list[list[int]], tmp_path: Path
) -> None:
    kept = all_rows(build(model, ids, tmp_path / "kept"))
    states = build(model, ids, tmp_path / "small", limit_bytes=100)
    assert torch.equal(all_rows(states), kept)
    assert not (tmp_path / "small").exists()


def test_what_is_not_kept_leaves_no_file_however_the_process_ends(
    model: UniMoER, ids: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file has no name any more while it is written."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = []
    states = build(model, ids, None, advance=lambda tokens: seen.append(list(tmp_path.iterdir())))
    assert seen and not any(seen) and torch.isfinite(all_rows(states)).all()


def test_a_full_disk_is_an_error_and_no_bus_error(
    model: UniMoER, ids: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=r"no room for .* MB of states \(No space left"):
        build(model, ids, tmp_path)
    assert not list(tmp_path.iterdir())


def test_states_of_other_code_are_not_used(
    model: UniMoER, ids: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(model, ids, tmp_path)
    monkeypatch.setattr(prefix, "_code", lambda: "another")
    build(model, ids, tmp_path)
    assert len(list(tmp_path.glob("*.states"))) == 2


def test_what_killed_runs_left_goes_and_what_is_being_made_stays(
    model: UniMoER, ids: list[list[int]], tmp_path: Path
) -> None:
    killed, live, new = (tmp_path / f"{name}.part" for name in ("killed", "live", "new"))
    for path in (killed, live, new):
        path.write_bytes(b"half")
    earlier = time.time() - 61
    with open(live, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for path in (killed, live):
            os.utime(path, (earlier, earlier))
        build(model, ids, tmp_path)
    assert not killed.exists() and live.exists() and new.exists()


def test_files_that_go_while_they_are_looked_at(
    model: UniMoER, ids: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process evicts or finishes them."""
    build(model, ids, tmp_path, "a")
    glob = Path.glob
    gone = [tmp_path / "gone.states", tmp_path / "gone.part"]
    monkeypatch.setattr(Path, "glob", lambda self, of: [*glob(self, of), *(
        path for path in gone if path.match(of))])  # fmt: skip
    build(model, ids, tmp_path, "b")
    assert len(list(tmp_path.iterdir())) == 4


def test_states_are_for_all_who_share_the_cache(
    model: UniMoER, ids: list[list[int]], tmp_path: Path
) -> None:
    build(model, ids, tmp_path)
    (note,) = tmp_path.glob("*.json")
    (states,) = tmp_path.glob("*.states")
    assert states.stat().st_mode == note.stat().st_mode


# Batches -------------------------------------------------------------------------------------


def test_token_batches_by_hand() -> None:
    assert token_batches([5, 1, 9, 2, 2], 6) == [[1, 3, 4], [0], [2]]
    assert token_batches([], 6) == []
    assert token_batches([7], 6) == [[0]], "a text longer than the budget goes alone"


def test_token_batches_hold_everything_once() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 60, (200,), generator=generator).tolist()
    batches = token_batches(lengths, 100)
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    assert all(sum(lengths[i] for i in batch) <= 100 for batch in batches)
    flat = [lengths[i] for batch in batches for i in batch]
    assert flat == sorted(flat), "neighbours are equally long, so attention runs in few calls"
    following = zip(batches[:-1], batches[1:], strict=True)
    full = [sum(lengths[i] for i in batch) + lengths[after[0]] for batch, after in following]
    assert min(full) > 100, "no batch could have taken the next text"

"""Files of frozen-prefix states: their names, what damages or kills them, how many are kept."""

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

from model import prefix
from model.unimoer import UniMoER
from tests.model.prefixes import TEXTS, all_rows, build, make_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> UniMoER:
    return make_model(tiny_base)


@pytest.fixture(scope="module")
def ids(model: UniMoER) -> list[list[int]]:
    return model.tokenizer.documents(TEXTS)


def states_file(folder: Path) -> Path:
    (path,) = folder.glob("*.states")
    return path


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

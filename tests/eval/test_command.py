"""How commands end."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from eval.command import exit_status
from model import weights
from model.files import write_array, write_json


def raising(problem: BaseException):
    def work() -> None:
        raise problem

    return work


def test_what_a_user_can_mend_is_one_line(capsys: pytest.CaptureFixture) -> None:
    assert exit_status(lambda: None) == 0
    assert exit_status(raising(ValueError("rows: found 3"))) == 2
    assert exit_status(raising(ArithmeticError()), ArithmeticError) == 2
    assert capsys.readouterr().err.splitlines() == ["error: rows: found 3", "error: "]


@pytest.mark.parametrize(
    "fault", [TypeError("ours"), OSError(errno.ECHILD, "none", "x"), KeyError("x")]
)
def test_our_own_faults_keep_their_traceback(fault: Exception) -> None:
    with pytest.raises(type(fault)):
        exit_status(raising(fault))


def test_a_place_where_nothing_can_be_written_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "a").touch()
    for work in (lambda: (tmp_path / "a" / "b").mkdir(), lambda: (tmp_path / "a").mkdir(),
                 lambda: write_json(tmp_path / "a" / "b.json", {}),
                 lambda: list((tmp_path / "a").iterdir())):  # fmt: skip
        assert exit_status(work) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: {tmp_path / 'a'}") and "Give another place" in err


def full_json(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_room)
    write_json(path, {"a": 2})


def full_array(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_room)
    write_array(path, np.ones(3))


def full_safetensors(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(tensors, name: Path, metadata) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")

    monkeypatch.setattr(weights, "save_file", no_room)
    weights.save({"w": torch.ones(3)}, path)


@pytest.mark.parametrize("write", [full_json, full_array, full_safetensors])
def test_a_full_disk_is_named_and_what_was_there_stays(
    write: Callable[[Path, pytest.MonkeyPatch], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    path = tmp_path / "result"
    path.write_text("what was there")
    assert exit_status(lambda: write(path, monkeypatch)) == 2
    assert f"error: {path} cannot be written (No space left on device)" in capsys.readouterr().err
    assert path.read_text() == "what was there" and list(tmp_path.iterdir()) == [path]

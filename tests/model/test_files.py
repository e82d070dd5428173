"""model/files.py: what is there is whole, what is damaged is named, a lock is one process's."""

import json
import math
import os
import time
from pathlib import Path

import pytest

from model.files import locked, put, read_json, whole, write_json
from tests.processes import Child


def test_a_result_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), whole(path) as file:
        file.write(b"half of it")
        raise KeyError
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"{", "cannot be read as JSON"), (b"[1]", "holds a list, expected a JSON object"),
     (None, "cannot be read as JSON")],
    ids=["cut", "list", "missing"],
)  # fmt: skip
def test_a_file_that_cannot_be_read_says_what_to_do(tmp_path: Path, content, why: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.json {why}.*: make it anew"):
        read_json(path, "make it anew")


def test_a_folder_takes_its_name_at_once(tmp_path: Path) -> None:
    part = tmp_path / ".part"
    (part / "deep").mkdir(parents=True)
    (part / "deep" / "a").write_text("x")
    put(part, tmp_path / "whole")
    assert not part.exists() and (tmp_path / "whole" / "deep" / "a").read_text() == "x"


def hold(folder: Path) -> int:
    """Take the lock, say so, and wait to be killed."""
    with locked(folder):
        (folder / "held").touch()
        time.sleep(600)
    return 0


def test_a_lock_is_one_process_s_and_goes_with_it(tmp_path: Path) -> None:
    child = Child(tmp_path / "log.txt", hold, tmp_path)
    while not (tmp_path / "held").exists():
        assert child.code is None, child.text
        time.sleep(0.01)
    with (
        pytest.raises(ValueError, match="another mines here"),
        locked(tmp_path, "another mines here"),
    ):
        pytest.fail("two hold it")
    child.kill()
    with locked(tmp_path, "another mines here"):
        pass

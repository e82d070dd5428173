"""Pieces of a long result."""

from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest

from eval.provenance import made_by
from eval.stages import Stages, discard, held
from model import parallel


def forbidden() -> None:
    raise AssertionError("this is there already")


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    stages = Stages(tmp_path / "result.json", {"depth": 3, "widths": (1, 2)})
    made = {"q": {"map": 0.1 + 0.2}}
    assert stages.kept("retrieval", lambda: made) == made
    again = Stages(tmp_path / "result.json", {"depth": 3, "widths": (1, 2)})
    assert again.kept("retrieval", forbidden) == made
    discard(tmp_path / "result.json")
    assert list(tmp_path.iterdir()) == []


def test_pieces_of_something_else(tmp_path: Path) -> None:
    Stages(tmp_path / "result.json", {"depth": 3, "device": "cpu"}).kept("a", lambda: 1)
    with pytest.raises(ValueError, match=r"result.json.part holds pieces .* another depth: remove"):
        Stages(tmp_path / "result.json", {"depth": 4, "device": "cpu"})
    # Nothing was finished there yet.
    Stages(tmp_path / "other.json", {"depth": 3})
    assert Stages(tmp_path / "other.json", {"depth": 4}).kept("a", lambda: 1) == 1


def test_pieces_of_other_code_are_gone_on_with_and_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("eval.stages.sources", lambda: "old")
    first = Stages(tmp_path / "result.json", {"depth": 3})
    first.kept("a", lambda: 1)
    assert first.begun == ["old"]
    monkeypatch.setattr("eval.stages.sources", lambda: "new")
    assert Stages(tmp_path / "result.json", {"depth": 3}).begun == ["new", "old"]
    assert Stages(tmp_path / "result.json", {"depth": 3}).begun == ["new", "old"]
    monkeypatch.setattr("eval.provenance.sources", lambda *more: "new")
    assert made_by("cpu", begun=["new", "old"])["begun_by_sources"] == ["old"]
    assert "begun_by_sources" not in made_by("cpu", begun=["new"])


def test_an_array_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    stages = Stages(tmp_path / "result.json", {})
    assert stages.latest("keys") is None
    for end in (9, 10, 200):
        stages.advance("keys", end, np.full(2, end))
    stages.advance("keys-of-base", 5, np.zeros(1))
    end, found = stages.latest("keys") or (0, np.zeros(0))
    assert end == 200 and found.tolist() == [200, 200]
    assert len(list(stages.folder.glob("*.npy"))) == 2
    # Killed between the new one and the removal of the old.
    np.save(stages.folder / "keys-000000000010.npy", np.zeros(2))
    assert (stages.latest("keys") or (0,))[0] == 200


def test_a_line_that_a_kill_cut_is_left_out(tmp_path: Path) -> None:
    stages = Stages(tmp_path / "result.json", {})
    assert stages.rows("questions") == []
    for row in ({"q": 1}, {"q": "zwei"}):
        stages.append("questions", row)
    with open(stages.folder / "questions.jsonl", "a") as file:
        file.write('{"q": 3')
    assert stages.rows("questions") == [{"q": 1}, {"q": "zwei"}]
    stages.append("questions", {"q": 4})
    assert stages.rows("questions")[-1] == {"q": 4}


def test_pieces_of_something_else_are_removed_if_asked_for(tmp_path: Path) -> None:
    Stages(tmp_path / "result.json", {"depth": 3}).kept("a", lambda: 1)
    assert Stages(tmp_path / "result.json", {"depth": 3}, renew=True).kept("a", forbidden) == 1
    assert Stages(tmp_path / "result.json", {"depth": 4}, renew=True).kept("a", lambda: 2) == 2
    discard(tmp_path / "result.json")
    assert list(tmp_path.iterdir()) == []


def test_the_first_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.parallel.rank", lambda: 1)
    stages = Stages(tmp_path / "result.json", {"depth": 3})
    assert stages.kept("a", lambda: {"widths": (1, 2)}) == {"widths": [1, 2]}
    stages.advance("keys", 1, np.zeros(2))
    assert list(tmp_path.iterdir()) == []


def test_who_wants_what_another_makes_waits_for_it(tmp_path: Path) -> None:
    """Also where the pieces of an earlier run are removed meanwhile; no lock is left."""
    place, order, asked = tmp_path / "result.json", [], Event()

    def second() -> None:
        asked.set()
        with held(place):
            order.append(place.exists())

    thread = Thread(target=second)
    with held(place):
        Stages(place, {"depth": 3}, renew=True).kept("a", lambda: 1)
        thread.start()
        asked.wait()
        thread.join(0.2)
        assert order == [], "it waits"
        place.write_text("{}")
        discard(place)
    thread.join()
    assert order == [True] and list(tmp_path.iterdir()) == [place]


def test_a_job_does_not_wait_for_another_process(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(parallel, "wait", lambda: None)
    with held(tmp_path / "result.json"):
        monkeypatch.setattr(parallel, "world", lambda: 2)
        with pytest.raises(ValueError, match="another process makes result.json: wait for it"):
            with held(tmp_path / "result.json"):
                pass
        monkeypatch.setattr(parallel, "rank", lambda: 1)
        with held(tmp_path / "result.json"):  # rank 0 holds it for all
            pass

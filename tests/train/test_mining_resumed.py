"""train/mining.py: what a killed run leaves is taken up, or refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from eval.collections import Collection
from eval.machine import device_name
from model.unimoer import UniMoER
from tests.train.mined import WIDE
from tests.train.tiny import TRAIN
from train import first_stage, mining
from train.mining import LEXICAL, mine
from train.negatives import mined_sha256


class Stopped(Exception):
    """Stands for whatever ends a run."""


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, list]:
    """Every text and pair that a model is asked for."""
    seen: dict[str, list] = {"encode": [], "pairs": []}
    encode, pairs = UniMoER.encode, mining.logits

    def counting(self, texts, **options):
        seen["encode"] += [(options["task"], text) for text in texts]
        return encode(self, texts, **options)

    def counting_pairs(model, collection):
        score = pairs(model, collection)

        def scored(wanted):
            seen["pairs"] += [(id(score), pair) for pair in wanted]
            return score(wanted)

        return scored

    monkeypatch.setattr(UniMoER, "encode", counting)
    monkeypatch.setattr(mining, "logits", counting_pairs)
    return seen


def forget(seen: dict[str, list]) -> None:
    for asked in seen.values():
        asked.clear()


def test_killed_and_continued_recomputes_nothing(
    collection: Collection, folders: list[str], tmp_path: Path, monkeypatch, counted
) -> None:
    monkeypatch.setattr(first_stage, "SHARD", 20)
    monkeypatch.setattr(mining, "AT_ONCE", 2 * WIDE.part)

    def run(name: str) -> dict:
        return mine(tmp_path / name, collection, WIDE, folders[0], "", folders[1])

    run("unbroken")
    whole = {kind: sorted(x[1] for x in asked) for kind, asked in counted.items()}
    forget(counted)
    writers: list[tuple[object, str]] = [(first_stage, "write_array"), (mining, "write_text")]
    for module, name in writers:  # killed after the first shard, then after a part
        write, calls = getattr(module, name), []

        def broken(path: Path, content, write=write, calls=calls) -> None:
            if calls:
                raise Stopped
            calls.append(path)
            write(path, content)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, broken)
            with pytest.raises(Stopped):
                run("broken")
    own = device_name("cpu")
    monkeypatch.setattr(mining, "device_name", lambda device: "another machine")
    manifest = run("broken")
    assert manifest["devices"] == [own, "another machine"]
    assert manifest["sha256"] == mined_sha256(tmp_path / "unbroken")
    for kind, least in (("encode", whole["encode"]), ("pairs", whole["pairs"])):
        asked = sorted(x[1] for x in counted[kind])
        assert set(map(str, asked)) == set(map(str, least))
        again = len(asked) - len(least)
        # Once more: the shard that was being made, the queries of the pass, a part's pairs.
        part = WIDE.part
        assert again == (20 + 2 * part if kind == "encode" else part * (1 + WIDE.negatives))
    forget(counted)
    assert run("broken") == manifest and counted == {"encode": [], "pairs": []}


@pytest.mark.parametrize("done", [0, 2])
def test_pieces_of_another_order_are_not_taken_up(
    collection: Collection, folders: list[str], tmp_path: Path, monkeypatch, done: int
) -> None:
    """A corpus that was written anew in other rows has the same fingerprint: neither vectors nor
    parts, whose strangers are drawn by position, are of it."""
    monkeypatch.setattr(first_stage, "SHARD", 20)
    pools = {split: pool[::-1] for split, pool in collection.pools.items()}
    other = replace(collection, pools=pools)
    mine(tmp_path / "unbroken", other, WIDE, folders[0])
    part, calls = mining._part, []

    def broken(*given):
        calls.append(given)
        if len(calls) > done:
            raise Stopped
        return part(*given)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(mining, "_part", broken)
        mine(tmp_path / "broken", collection, WIDE, folders[0])
    assert len(list((tmp_path / "broken").rglob("parts/*/*.jsonl"))) == done
    found = mine(tmp_path / "broken", other, WIDE, folders[0])
    assert found["sha256"] == mined_sha256(tmp_path / "unbroken")


def test_a_run_killed_at_its_end_is_finished_from_its_parts(
    collection: Collection, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(mining, "_finish", lambda *_: (_ for _ in ()).throw(Stopped()))
    with pytest.raises(Stopped):
        mine(tmp_path / "a", collection, WIDE, LEXICAL)
    with pytest.raises(ValueError, match="is not finished: run its"):
        mined_sha256(tmp_path / "a")
    monkeypatch.undo()
    monkeypatch.setattr(mining, "_part", lambda *_: pytest.fail("nothing is left to mine"))
    assert mine(tmp_path / "a", collection, WIDE, LEXICAL)["mined"]["queries"] == TRAIN
    left = tmp_path / "a" / "vectors"  # killed between the manifest and the removal
    left.mkdir()
    mine(tmp_path / "a", collection, WIDE, LEXICAL)
    assert not left.exists()


def test_a_mixture_is_refused(collection: Collection, folders: list[str], tmp_path: Path) -> None:
    mine(tmp_path / "a", collection, WIDE, LEXICAL)
    with pytest.raises(ValueError, match=r"was mined otherwise \(margin: 0 there, 0.9 here\)"):
        mine(tmp_path / "a", collection, replace(WIDE, margin=0.9), LEXICAL)
    with pytest.raises(ValueError, match=r"\(retriever: bm25 there, [0-9a-f]{16} here; scores: "):
        mine(tmp_path / "a", collection, WIDE, folders[0])
    with pytest.raises(ValueError, match="data: .*'fingerprint': 'other'"):
        mine(tmp_path / "a", replace(collection, fingerprint="other"), WIDE, LEXICAL)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="is not empty and was not mined"):
        mine(tmp_path / "mine", collection, WIDE, LEXICAL)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]

"""A damaged file of a base or a saved model is an error that names the file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from model.unimoer import ModelConfig, UniMoER


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ["{", "", "[1]"])
def test_of_a_base(make_base: Callable[..., Path], name: str, content: str) -> None:
    folder = make_base()
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=name):
        UniMoER(ModelConfig(base=str(folder)))


@pytest.fixture
def saved(tiny_base: Path, tmp_path: Path) -> Path:
    UniMoER(ModelConfig(base=str(tiny_base))).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("content", ["{", "[1]", '{"format": 1, "model": {"prompts": {}}}'])
def test_of_a_saved_model(saved: Path, content: str) -> None:
    (saved / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"saved/config\.json"):
        UniMoER.from_pretrained(saved)


def test_an_unknown_field_of_a_saved_model(saved: Path) -> None:
    record = json.loads((saved / "config.json").read_text())
    record["model"]["colour"] = "red"
    (saved / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"saved/config\.json.*colour"):
        UniMoER.from_pretrained(saved)


def test_killed_while_writing_over_a_folder(
    saved: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New tensors never stand beside an old config.json."""

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("model.weights.save", die)
    with pytest.raises(KeyboardInterrupt):
        UniMoER(ModelConfig(base=str(tiny_base))).save_pretrained(saved)
    with pytest.raises(ValueError, match="config.json is missing"):
        UniMoER.from_pretrained(saved)


def test_a_moved_base_is_given_as_a_folder(saved: Path, tiny_base: Path, tmp_path: Path) -> None:
    record = json.loads((saved / "config.json").read_text())
    record["model"]["revision"] = "f" * 40  # as of a hub id; the copied folder tells none
    (saved / "config.json").write_text(json.dumps(record))
    moved = shutil.copytree(tiny_base, tmp_path / "moved")
    assert UniMoER.from_pretrained(saved, base=str(moved)).config.revision is None

"""Commands of `eval` and `train` under `torchrun`: shared, or refused."""

import json
import shutil
from pathlib import Path

import pytest

from eval import __main__ as program
from eval import protocol
from model.tokens import Tokenizer
from tests.processes import ranks
from tests.train.tiny import moved, tiny_config, write_collection
from train import __main__ as training


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_collection(tmp_path_factory.mktemp("data") / "Tiny")


@pytest.fixture(scope="module")
def model(tiny_base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "arm" / "seed0.model"
    moved(tiny_config(tiny_base, data)).save_pretrained(folder)
    return folder


def counted(window: int, words: list[str]) -> int:
    """A command, and how many texts this process has tokenized for it."""
    protocol.WINDOW, texts = window, []
    for name in ("documents", "pairs"):
        right = getattr(Tokenizer, name)

        def tokenize(self, some, right=right):
            texts.extend(some)
            return right(self, some)

        setattr(Tokenizer, name, tokenize)
    code = program.main(words)
    print(len(texts))
    return code


def made(out: Path) -> dict[str, object]:
    """What each file says."""
    files = [path for path in out.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(out)): json.loads(text) if path.suffix == ".json" else text
        for path, text in ((path, path.read_text()) for path in files)
    }


@pytest.mark.parametrize(("command", "window"), [("beir", 1000), ("beir", 20), ("baselines", 20)])
def test_two_processes_make_the_files_of_one(
    command: str, window: int, data: Path, model: Path, tmp_path: Path
) -> None:
    """The same bits, with nothing left beside them, each from half of the texts; the first process
    prints what one does."""
    other = shutil.copytree(data, tmp_path / "Other", dirs_exist_ok=True)
    words = [command, "--data", str(data), str(other), "--device", "cpu"]
    words += ["--untrained", "--models" if command == "baselines" else "--model", str(model)]
    words += ["--rows", "bm25"] * (command == "baselines")
    tables, texts = [], []
    for processes in (1, 2):
        out = tmp_path / f"{processes}"
        job = ranks(
            processes, tmp_path / f"of{out.name}", counted, window, [*words, f"--out={out}"]
        )
        assert [rank.wait() for rank in job] == [0] * processes, [rank.text for rank in job]
        tables.append([[s for s in rank.text.splitlines() if s.startswith("| ")] for rank in job])
        texts.append([int(rank.text.splitlines()[-1]) for rank in job])
    assert made(tmp_path / "2") == made(tmp_path / "1") != {}
    assert tables[0][0] and tables[1] == [tables[0][0], []]
    assert sum(texts[1]) == texts[0][0] and min(texts[1]) > 0.4 * texts[0][0]


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (program.main, ["mteb", "--model", "x", "--tasks", "x"]),
        (program.main, ["rag", "--model", "x", "--data", "x"]),
        (program.main, ["search", "--model", "x", "--data", "x"]),
        (training.main, ["mine", "--model", "bm25"]),
    ],
)
def test_what_is_not_shared_is_refused(main, words: list[str], monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(words) == 2
    told = f"error: {words[0]} is the work of one process, not of 2: leave out torchrun"
    assert capsys.readouterr().err.splitlines() == [told]

"""A hub that is not there, and processes that are not started."""

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from eval import __main__ as program

Files = dict[str, dict[str, bytes]]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Files, list[tuple]]:
    """repository -> file name -> bytes, served as hf_hub_download would; `asked` logs the calls
    that fetch."""
    files: Files = {}
    asked = []

    def download(repo, name, *, repo_type, revision, cache_dir, dry_run=False):
        if not dry_run:
            asked.append((repo, name, revision, cache_dir))
        assert repo_type == "dataset"
        if repo not in files:
            raise LocalEntryNotFoundError("no network, nothing cached")
        if name not in files[repo]:
            raise EntryNotFoundError(f"404: {name}")
        commit = revision or f"commit-of-{repo.split('/')[1]}"
        path = tmp_path / "hub" / repo / "snapshots" / commit / name
        if dry_run:
            size, new = len(files[repo][name]), not path.exists()
            return SimpleNamespace(filename=name, file_size=size, will_download=new)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[repo][name])
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return files, asked


@pytest.fixture
def hub_files(hub: tuple[Files, list[tuple]]) -> tuple[Files, list[tuple]]:
    """The same, for tests in whose file `hub` is the module."""
    return hub


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts that `rag` starts as processes of their own, whose imports take most of a test."""
    here = SimpleNamespace(
        run=lambda words, check: SimpleNamespace(returncode=program.main(words[3:]))
    )
    monkeypatch.setattr(program, "subprocess", here)

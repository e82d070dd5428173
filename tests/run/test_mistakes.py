"""run.py as a command: what a user can get wrong is one line, and what is not needed stays out."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import run
from tests.processes import ROOT
from tests.run.shared import forbidden

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "steps"], "--set 'steps': expected FIELD=VALUE"),
        (["--set", "stepz=3"], "a field of trials.Config"),
        (["--set", "=3"], "expected FIELD=VALUE"),
        (["--set", "seed=3"], "seed has an option of its own, --seeds"),
        (["--set", "data=scifact"], "data has an option of its own, --data"),
        (
            ["--set", "seed_offset=1000", "--arms", "emb-only", "emb-only-aa"],
            "--set makes emb-only and emb-only-aa the same trial",
        ),
        (["--controls"], "--arms names all arms that are run: leave out --controls"),
        (["--set", "checkpoint_every=0"], "checkpoint_every must be at least 1, got 0"),
        (["--set", "reranking_queries=-1"], "reranking_queries must be at least 0, got -1"),
        (
            ["--set", "probes=1", "--set", "shard=true", "--arms", "joint-single"],
            "probes watch whole weights",
        ),
        (["--set", "probes=1"], "leave out the arms that train ('embedding',) alone"),
        (["--set", "steps=many"], "--set 'steps=many': expected <class 'int'>, as 1000"),
        (["--set", "steps=1.5"], "expected <class 'int'>"),
        (["--set", "layers=all"], "expected int | None"),
        (["--set", "learning_rate=fast"], "expected <class 'float'>, as 0.0001"),
        (["--set", "tasks=embedding"], "expected tuple[str, ...]"),
        (["--set", "steps=0"], "steps must be at least 1, got 0"),
        (["--set", 'tasks=["retrieval"]'], "tasks must be some of embedding, reranking"),
        (["--arms", "emb-only", "emb"], "unknown arms ['emb']: kill_gate has ['emb-only', "),
        (["--seeds", "-1"], "--seeds -1: expected at least 1"),
        (["--data", "nowhere"], "nowhere: neither a collection nor a folder"),
        (["--base", "nowhere"], "unknown base 'nowhere'"),
        (["--split", "final"], "Tiny has no final split"),
        (["--set", "layers=5"], "layers=5, but this base has 4"),
        (["--set", "router=magic"], "magic"),
        (["--set", "matryoshka=[8,32]"], "matryoshka (8, 32): expected widths below 32"),
        (["--set", "embedding_batch=99"], "24 training queries with a relevant document"),
    ],
)
def test_a_user_s_mistake_is_one_line_and_code_2(words, tmp_path, cache, capsys, more, message):
    assert run.main(words(tmp_path / "runs", *more)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_data_without_a_train_split(words, data, tmp_path, cache, monkeypatch, capsys):
    monkeypatch.setattr(run, "run_baselines", forbidden)  # the dear part comes after
    bare = Path(shutil.copytree(data, tmp_path / "bare"))
    (bare / "qrels" / "train.tsv").unlink()
    assert run.main(words(tmp_path / "runs", "--data", str(bare))) == 2
    assert "bare has no train split (it has dev, test): add qrels/tr" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["run"], ["run", "nothing"], ["fly"], ["list", "x"]])
def test_argparse_refuses(words, capsys):
    with pytest.raises(SystemExit) as caught:
        run.main(words)
    assert caught.value.code == 2 and "usage: python -m run" in capsys.readouterr().err


def test_python_m_run():
    """Without what only some commands need, each of which takes a second or more to import."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "run", "list"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("kill_gate: "), done.stderr
    taken = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    late = {"sklearn", "umap", "torch._dynamo", "torch.distributed.fsdp", "mteb", "transformers"}
    assert "torch" in taken and not late & taken

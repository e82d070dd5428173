"""Several processes over gloo, some of them through torchrun: the losses, parameters and scores of
one."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import run
from eval.protocol import EvaluationSet
from model import parallel
from model.prefix import TextSet
from model.unimoer import UniMoER
from tests.processes import Command, environments, ranks
from train import loop, step

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "steps": 4, "dtype": "float64", "prefix": False, "train_queries": 0, "embedding_batch": 6,
    "reranking_batch": 3, "checkpoint_every": 2, "lora_dropout": 0.1,
}  # fmt: skip


def words(base: Path, data: Path, runs: Path, **changes) -> list[str]:
    """Arguments of `python -m run` for one trial of Joint-MoE."""
    made = ["run", "kill_gate", "--scale", "smoke", "--seeds", "1", "--arms", "joint-moe"]
    made += ["--base", str(base), "--data", str(data), "--runs", str(runs), "--device", "cpu"]
    for name, value in {**SETTINGS, **changes}.items():
        made += ["--set", f"{name}={json.dumps(value)}"]
    return made


def by_torchrun(processes: int, arguments: list[str]) -> str:
    """What a job prints that ended well."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", str(processes), "-m", "run", *arguments]
    job = subprocess.run(
        torchrun, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, timeout=300,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert job.returncode == 0, job.stdout
    return job.stdout


def by_itself(processes: int, arguments: list[str], folder: Path) -> str:
    """The same of ranks that are forked, which begin at once."""
    job = ranks(processes, folder, run.main, arguments)
    try:
        codes = [rank.wait() for rank in job]
    finally:
        for rank in job:
            rank.kill()
    text = "".join(rank.text for rank in job)
    assert codes == [0] * processes, text
    return text


def found(runs: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """The only trial's result and parameters."""
    (path,) = runs.glob("kill_gate/*/joint-moe/seed0.json")
    folder = path.with_suffix(".model")
    tensors = load_file(folder / "adapters.safetensors") | load_file(folder / "heads.safetensors")
    return json.loads(path.read_text()), tensors


def assert_alike(one: Path, other: Path) -> None:
    (first, tensors), (second, others) = found(one), found(other)
    for line, again in zip(first["curve"], second["curve"], strict=True):
        for key in ("loss_embedding", "loss_reranking", "loss_balance", "gradient_norm"):
            assert again[key] == pytest.approx(line[key], rel=1e-8), (line["step"], key)
    for name, tensor in tensors.items():
        torch.testing.assert_close(others[name], tensor, rtol=1e-6, atol=1e-9, msg=name)
    assert second["scores"] == first["scores"]


@pytest.fixture(scope="module")
def single(tiny_base: Path, tiny_data: Path, tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("single")
    assert run.main(words(tiny_base, tiny_data, runs)) == 0
    return runs


@pytest.mark.parametrize(
    ("processes", "changes"),
    [(2, {}), (2, {"shard": True, "cached_tokens": 30}), (4, {"cached_tokens": 30})],
)
def test_processes_train_like_one(tiny_base, tiny_data, tmp_path, single, processes, changes):
    """Also with gradients in parts (`cached_tokens`) and with the base in shards."""
    arguments = words(tiny_base, tiny_data, tmp_path, **changes)
    if changes:
        output = by_itself(processes, arguments, tmp_path / "output")
    else:
        output = by_torchrun(processes, arguments)
    assert output.count("joint-moe seed 0 ") == 1  # rank 0 speaks for all
    assert found(tmp_path)[0]["processes"] == processes
    assert_alike(single, tmp_path)


def test_widths_and_pseudo_queries_over_processes(tiny_base, tiny_data, tmp_path):
    """Matryoshka's terms and RankNet's see all texts of the batch, wherever they were embedded, and
    each is read by its last token."""
    changes = {
        "matryoshka": [8, 16], "rerank_head": "pseudo_query", "embedding_pooling": "last",
    }  # fmt: skip
    assert run.main(words(tiny_base, tiny_data, tmp_path / "one", **changes)) == 0
    by_itself(2, words(tiny_base, tiny_data, tmp_path / "two", **changes), tmp_path / "output")
    assert_alike(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("shard", [False, True])
def test_a_killed_process_ends_the_job_and_one_process_finishes_it(
    tiny_base, tiny_data, tmp_path, shard
):
    """The other says what happened, also where FSDP notices first."""
    steps = {"steps": 60, "checkpoint_every": 1}
    arguments = words(tiny_base, tiny_data, tmp_path / "runs", **steps, shard=shard)
    if shard:  # the real command, to its end
        survivor, killed = (
            Command(tmp_path / f"rank{told['RANK']}.txt", *arguments, **told)
            for told in environments(2)
        )
    else:
        survivor, killed = ranks(2, tmp_path / "output", run.main, arguments)
    log = tmp_path / "runs/kill_gate"
    deadline = time.monotonic() + 200
    try:
        while not any(log.glob("*/joint-moe/seed0.checkpoint/*")) and time.monotonic() < deadline:
            assert survivor.code is None, survivor.text
            time.sleep(0.02)
        killed.kill()
        code, output = survivor.wait(100), survivor.text
    finally:
        for process in (survivor, killed):
            process.kill()
    assert code == 2 and "Traceback" not in output, output
    assert "rank 0 of 2 lost another process of the job" in output
    assert not any(log.glob("*/joint-moe/seed0.json")), "it was to be killed amid its steps"
    for runs in ("runs", "whole"):  # the one goes on, the other begins
        assert run.main(words(tiny_base, tiny_data, tmp_path / runs, **steps, shard=shard)) == 0
    assert_alike(tmp_path / "whole", tmp_path / "runs")


def test_what_one_process_began_two_go_on_with_amid_its_steps(
    tiny_base, tiny_data, tmp_path, single, monkeypatch
):
    """From its checkpoint after two of four steps."""

    def stop(step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    real = loop.schedule
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "schedule", lambda step, *rest: stop(step) or real(step, *rest))
        run.main(words(tiny_base, tiny_data, tmp_path / "runs"))
    (log,) = tmp_path.glob("runs/kill_gate/*/joint-moe/seed0.log.jsonl")
    assert len(log.read_text().splitlines()) == 2
    by_itself(2, words(tiny_base, tiny_data, tmp_path / "runs"), tmp_path / "output")
    assert_alike(single, tmp_path / "runs")


def test_scores_that_one_process_began_are_finished_by_two(
    tiny_base, tiny_data, tmp_path, single, monkeypatch
):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(EvaluationSet, "reranking", stop)
    with pytest.raises(KeyboardInterrupt):
        run.main(words(tiny_base, tiny_data, tmp_path / "runs"))
    (piece,) = tmp_path.glob("runs/kill_gate/*/joint-moe/seed0.json.part/retrieval.json")
    arguments = words(tiny_base, tiny_data, tmp_path / "runs")
    output = by_itself(2, arguments, tmp_path / "output")
    assert "test embedding" not in output, "retrieval was there"
    assert_alike(single, tmp_path / "runs")
    assert not piece.parent.exists()


def test_one_process_needs_no_job(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert parallel.join("cpu") == "cpu"
    assert (parallel.rank(), parallel.world()) == (0, 1)
    rows = torch.ones(2, 3)
    assert torch.equal(parallel.gather(rows, [2])[0], torch.ones(2, 3))
    parallel.add([rows])
    assert torch.equal(rows, torch.ones(2, 3))
    parallel.wait()
    with parallel.first(), parallel.alone():
        pass


def test_only_a_lost_connection_is_told_as_a_lost_process(monkeypatch):
    """Outside a job nothing is; within one, neither is another error of ours."""
    gone = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer")

    def told(error: Exception) -> Exception:
        with pytest.raises(RuntimeError) as raised, parallel.connected():
            raise error
        return raised.value

    assert told(gone) is gone
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    own = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert told(own) is own
    for error in (gone, dist.DistBackendError("NCCL error: remote process exited")):
        found = told(error)
        assert isinstance(found, parallel.LostProcess) and found.__cause__ is error
        assert "rank 1 of 4 lost another process" in str(found)


def test_more_processes_than_cards(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="process 2 .* no card of its own, there are 2"):
        parallel.join("cuda")


def test_a_batch_smaller_than_the_job(monkeypatch):
    monkeypatch.setattr(parallel, "world", lambda: 40)
    with pytest.raises(ValueError, match="embedding micro-batch has 2 texts for 40 processes"):
        step.Work("embedding", UniMoER.embed, TextSet([[1], [2]]), [0, 1], torch.sum, ["q"])

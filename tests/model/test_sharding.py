"""model/sharding.py: each process keeps its share and computes what a whole model computes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from model import parallel, sharding
from model.lora import LinearGroup
from model.unimoer import UniMoER
from tests.train.tiny import tiny_config
from train.trial import model_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("processes", [3])
def test_shards_compute_what_the_whole_computes(tiny_base: Path, processes: int):
    """Three: the rows do not divide evenly."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = [*torchrun, "--nproc-per-node", str(processes), "-m", "tests.model.sharded"]
    done = subprocess.run(
        [*words, str(tiny_base)], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("agrees") == processes


def test_one_process_keeps_everything(tiny_base: Path):
    model = UniMoER(model_config(tiny_config(tiny_base, tiny_base)))
    sharding.shard(model.decoder)
    assert not any(m.sharded for m in model.decoder.modules() if isinstance(m, LinearGroup))


def test_a_compact_model_is_refused(tiny_base: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parallel, "world", lambda: 2)
    model = UniMoER(model_config(tiny_config(tiny_base, tiny_base))).compact()
    with pytest.raises(ValueError, match="compact"):
        sharding.shard(model.decoder)

"""model/sharding.py: each process keeps its share and computes what a whole model computes."""

from pathlib import Path

import pytest

from model import parallel, sharding
from model.lora import LinearGroup
from model.unimoer import UniMoER
from tests.model import sharded
from tests.processes import ranks
from tests.train.tiny import tiny_config
from train.trial import model_config


def test_shards_compute_what_the_whole_computes(tiny_base: Path, tmp_path: Path):
    """Three: the rows do not divide evenly."""
    job = ranks(3, tmp_path, sharded.main, str(tiny_base))
    codes, text = [rank.wait() for rank in job], "".join(rank.text for rank in job)
    assert codes == [0] * 3 and text.count("agrees") == 3, text


def test_one_process_keeps_everything(tiny_base: Path):
    model = UniMoER(model_config(tiny_config(tiny_base, tiny_base)))
    sharding.shard(model.decoder)
    assert not any(m.sharded for m in model.decoder.modules() if isinstance(m, LinearGroup))


def test_a_compact_model_is_refused(tiny_base: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parallel, "world", lambda: 2)
    model = UniMoER(model_config(tiny_config(tiny_base, tiny_base))).compact()
    with pytest.raises(ValueError, match="compact"):
        sharding.shard(model.decoder)

"""What `test_sharding.py` starts in each process: its side of the checks."""

from dataclasses import replace

import torch
from torch.distributed.tensor import DTensor

from experiments import SPARSEGEN
from model import parallel, sharding
from model.lora import LinearGroup
from model.packed import pack
from model.unimoer import UniMoER
from tests.train.tiny import tiny_config
from train.trial import model_config


def main(base: str) -> int:
    device = parallel.join("cpu")
    rank, world = parallel.rank(), parallel.world()
    config = replace(tiny_config(base, base), **{**SPARSEGEN, "ranks": (4, 4, 4)})  # type: ignore
    whole, shared = (UniMoER(model_config(config), device) for _ in range(2))
    sharding.shard(shared.decoder)
    batch = pack([[5, 6, 7], [8, 9, 10, 11]])
    groups = [m for m in whole.decoder.modules() if isinstance(m, LinearGroup)]
    everything = sum(group.bordered.numel() for group in groups)
    assert held(shared) < everything * (1 / world + 0.05), (held(shared), everything)
    for step in range(3):  # experts change, the shards follow
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for p, q in zip(whole.trained().values(), shared.trained().values(), strict=True):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
                q.copy_(p)
        sharding.renew(shared.decoder)
        for of in (whole, shared):
            of.zero_grad(set_to_none=True)
            of.score(batch)[0].sum().backward()
        for name, p in whole.trained().items():
            torch.testing.assert_close(shared.trained()[name].grad, p.grad, msg=name)
        assert held(shared) < everything * (1 / world + 0.05), "a layer did not fall apart again"
    parallel.leave()
    print(f"rank {rank} of {world} agrees")
    return 0


def held(model: UniMoER) -> int:
    """Numbers of the frozen layers that this process keeps."""
    return sum(
        g.bordered.to_local().numel() for g in model.decoder.modules()
        if isinstance(g, LinearGroup) and isinstance(g.bordered, DTensor)
    )  # fmt: skip

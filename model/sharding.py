"""The frozen base in shards (FSDP2): each of n processes keeps 1/n of every layer's weights.

A layer is put together when it runs and falls apart again. Experts, routers and heads are small and
stay whole in every process, as `model.parallel` wants them; the embedding matrix and the norms too.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from model import parallel
from model.lora import LinearGroup
from model.transformer import Decoder


def shard(decoder: Decoder) -> None:
    """Share the layers out among the processes of the job; nothing where there is one.

    Every process then has to run the same number of passes, forward and backward. What a layer
    reads, experts' borders included, comes from the shards: call `renew` whenever the experts have
    changed.

    Raises:
        ValueError: the experts' masters were dropped, so nothing is to be trained.
    """
    if parallel.world() == 1:
        return
    # A second to import, and few jobs share a base out.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    groups = [module for module in decoder.modules() if isinstance(module, LinearGroup)]
    if any(group.dropped for group in groups):
        raise ValueError("compact() dropped what training needs: shard a model that has it")
    for group in groups:
        frozen = nn.Parameter(group.bordered, requires_grad=False)
        del group.bordered
        group.register_parameter("bordered", frozen)
        group.sharded = True
    weights = {id(group.bordered) for group in groups}
    whole = {p for p in decoder.parameters() if id(p) not in weights}
    mesh = init_device_mesh(decoder.embed_tokens.weight.device.type, (parallel.world(),))
    for module in (*decoder.layers, decoder):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    renew(decoder)


@torch.no_grad()
def renew(decoder: Decoder) -> None:
    """Write the experts into the borders of the rows that this process keeps."""
    for group in decoder.modules():
        if isinstance(group, LinearGroup) and group.sharded and group.adapted_names:
            local = cast(Any, group.bordered).to_local()  # a DTensor
            rows, world = group.layout.shape[0], parallel.world()
            # FSDP2 cuts as torch.chunk does.
            start = parallel.rank() * -(-rows // world)
            _write(group, local, start)


def _write(group: LinearGroup, mine: Tensor, start: int) -> None:
    """Copy those rows of A and B that lie in rows start, start + 1, ... of M."""
    for to, columns, master in group.borders():
        first, last = max(to.start, start), min(to.stop, start + len(mine))
        if first < last:
            part = master[first - to.start : last - to.start]
            mine[first - start : last - start, columns].copy_(part)

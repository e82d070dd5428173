"""Pilots for routing by similarity (RouterRetriever, arXiv 2409.02685)."""

from typing import Any

import torch

from model.layers import DecoderLayer
from model.packed import segment_mean
from model.router import TASKS
from model.texts import in_batches
from model.unimoer import UniMoER
from train.batches import TrainingData


@torch.no_grad()
def fit_pilots(model: UniMoER, data: TrainingData) -> None:
    """Set the pilots of the model's one router: k-means centroids of the base's view of each task.

    RouterRetriever embeds its training queries with the frozen base and groups them by the expert
    that serves them best. Here an expert is named for the task that it serves, so the groups are
    the training texts of the tasks. What is embedded is what the router sees: the mean over a
    text's tokens of the normalised input of the first routed layer, which no expert has touched.

    Raises:
        ValueError: a task has no training texts, or fewer than there are pilots.
    """
    from sklearn.cluster import k_means  # a second to import, and few arms have pilots
    from threadpoolctl import threadpool_limits

    assert model.config.lora is not None
    first = model.config.lora.first_layer
    layer = model.decoder.layers[first]
    assert isinstance(layer, DecoderLayer) and layer.router is not None
    router = layer.router

    def pooled(batch, states, base):
        hidden = model.decoder(batch, last_layer=first)[0] if states is None else states
        return segment_mean(layer.input_layernorm(hidden), batch), []

    for task in TASKS:
        texts = getattr(data, f"{task}_texts", None)
        size = router.config.pilots
        if texts is None or len(texts.ids) < size:
            raise ValueError(
                f"{router.config.kind} needs training texts of both tasks, at least {size} each "
                f"(pilots); {task} has {0 if texts is None else len(texts.ids)}"
            )
        seen = torch.zeros(len(texts.ids), router.pilots.shape[-1])
        done = in_batches(model.decoder, texts, pooled, progress=True, title=f"pilots, {task}")
        for indices, rows in done:
            seen[indices] = rows.float()
        unit = torch.nn.functional.normalize(seen, dim=-1)
        # scikit-learn's types know n_init as "auto" alone.
        ten: Any = 10
        with threadpool_limits(1):  # several add up in the order in which they come
            found = k_means(unit.numpy(), size, n_init=ten, random_state=0)[0]
        router.pilots[router.routed.index(task)] = torch.from_numpy(found).to(router.pilots)

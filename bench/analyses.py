"""What the analyses need beside the model on a card of 24 GB, counted."""

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

import experiments
from analysis.cka import BATCH as CKA_BATCH
from analysis.figures import table
from analysis.subspace import BATCH
from bench.costs import COLLECTIONS, batches
from bench.roofline import memory
from bench.shapes import SHAPES, lora_parameters
from model.config import DecoderConfig
from model.lora import LoRAConfig
from model.packed import pack
from model.router import RouterConfig
from model.texts import CARD_BUDGET
from model.transformer import Decoder

CARD = 24e9
RANKS = experiments.MOE["ranks"]
GRADIENTS = 4  # of each task, two halves


@cache
def saved_per_token(shape: DecoderConfig, checkpointing: bool = False, tokens: int = 96) -> float:
    """Bytes that autograd keeps for one token of one layer, counted on a pass through the layer.

    Layers are run on the CPU in bfloat16; what two keep beyond one is a layer's.
    """
    kept = []
    for layers in (1, 2):
        small = replace(shape, num_hidden_layers=layers, vocab_size=32)
        lora = LoRAConfig(experiments.THREE, RANKS, tuple(2.0 * r for r in RANKS))
        decoder = Decoder(small, lora, RouterConfig(), torch.bfloat16, checkpointing)
        with torch.no_grad():
            for weight in decoder.named_weights().values():
                weight.fill_(0.01)  # the values are nothing to what is kept
        own = {t.untyped_storage().data_ptr() for t in (*decoder.parameters(), *decoder.buffers())}
        found: dict[int, int] = {}

        def keep(tensor: Tensor, own=own, found=found) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        texts = [[i % 32 for i in range(tokens // 3)] for _ in range(3)]
        decoder.train()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden, _ = decoder(pack(texts, torch.device("cpu")))
        kept.append(sum(found.values()))
        del hidden
    return (kept[1] - kept[0]) / tokens


def count(shape: DecoderConfig, checkpointing: bool) -> dict[str, float]:
    """Bytes on the card by what they are for, at `SCALE=full`."""
    c = experiments.config("gradient_conflict", "joint-moe", "full", 0)
    d, layers = shape.hidden_size, shape.num_hidden_layers
    adapters = 4 * sum(RANKS) * lora_parameters(shape)  # fp32
    counts = COLLECTIONS["stdlib"]
    tokens = sum(tokens for tokens, _ in batches(c, counts).values())
    per_token = saved_per_token(shape, checkpointing)
    once = saved_per_token(shape) if checkpointing else 0.0  # the layer that is run again
    widest = max(d, shape.intermediate_size, shape.num_attention_heads * shape.head_dim)
    return {
        "weights, 16 bit, with experts": memory(shape, RANKS)["one"],
        "masters, their gradients, Adam's moments": 4 * adapters,
        "activations of a step (both tasks)": tokens * (per_token * layers + once),
        "gradients of the probes": GRADIENTS * adapters,
        "one linear's inner products, fp64": 8 * (
            2 * GRADIENTS * 2 * max(RANKS) * widest + widest * d
        ),
        "CKA, one layer and batch": 8 * (2 * CKA_BATCH * d + 3 * CKA_BATCH**2),
        # Two halves of each task, and the values and vectors of the one that is taken apart
        "STIR, covariances of one layer": 8 * (6 * d * d + BATCH * d),
        "features of one batch of texts": 4 * layers * (CARD_BUDGET // counts.document) * d,
    }  # fmt: skip


def section() -> str:
    """A column for each base: everything at once, though the analyses run one after the other."""
    names = ("qwen3-0.6b", "qwen3-1.7b")
    columns, heads = [], []
    for name in names:
        for checkpointing in (False, True):
            columns.append(count(SHAPES[name], checkpointing))
            heads.append(f"{name}{', checkpointing' if checkpointing else ''}")
    cells = [[what, *(f"{column[what] / 1e9:.3f}" for column in columns)] for what in columns[0]]
    totals = [sum(column.values()) for column in columns]
    cells.append(["all at once", *(f"{total / 1e9:.2f}" for total in totals)])
    cells.append(["fits 24 GB", *("yes" if total < CARD else "no" for total in totals)])
    return (
        "## The analyses beside the model\n\nGB on the card at full scale, with the mean lengths "
        "of the stdlib collection; activations as autograd keeps them, counted on one layer. "
        "Nothing in it depends on the number of texts that are looked into: features go to disk "
        "batch by batch and are read by layer and batch; probes are fitted on the host. "
        'Checkpointing is asked for with `ARGS="--set checkpointing=true"`.\n\n'
        + table(["GB", *heads], cells)
    )

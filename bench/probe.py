"""A minute of the real step at a base's shape: what `bench.costs` predicted for it, what it took.

Random weights and random texts of a log-normal length: neither speed nor memory depends on them.
The step is that of `train.loop` for the arm with experts and a router, its batches included; on a
CPU a part of them, since a whole one would take minutes. Encoding is a batch of the evaluation.
"""

import os
import random
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import costs, timing
from bench.costs import Counts, Option
from bench.designs import randomise
from bench.roofline import BANDWIDTH, GEMM, Card
from eval.machine import device_name
from kernels.choice import use_triton
from kernels.info_nce import info_nce
from model.config import DTYPES, DecoderConfig
from model.heads import LinearScore, run_pooled
from model.packed import Packed, pack
from model.processor import resolve_dtype
from model.router import TASKS
from model.texts import CARD_BUDGET
from model.transformer import Decoder
from train import losses
from train.loop import strict
from train.optim import adamw
from train.trial import model_config
from trials import Config

CPU_SHARE, CPU_BUDGET = 1 / 32, 1024  # of a step's batches; tokens of an encoding batch
SPREAD = 0.6  # sigma of the logarithm of a text's length, about that of MS MARCO's passages


def card_here(device: str) -> Card:
    """The machine at hand as a data sheet would have it: a large GEMM's rate and a large copy's,
    over what `bench.roofline` assumes to be attained of the peak."""
    on_cpu, dtype = device == "cpu", DTYPES[resolve_dtype("auto", device)]
    n, values = (1024, 1 << 23) if on_cpu else (4096, 1 << 27)
    a = torch.ones(n, n, device=device, dtype=dtype)
    x = torch.ones(values, device=device, dtype=dtype)
    y = torch.empty_like(x)
    gemm = timing.milliseconds(lambda: a @ a, device)["median"] / 1000
    copy = timing.milliseconds(lambda: y.copy_(x), device)["median"] / 1000
    if on_cpu:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        memory = torch.cuda.get_device_properties(device).total_memory
    rates = (2 * n**3 / gemm / GEMM, 2 * x.numel() * x.element_size() / copy / BANDWIDTH)
    return Card(device_name(device), *rates, memory)


@dataclass(frozen=True)
class Texts:
    """A batch sorted by length, and where each of its texts went."""

    batch: Packed
    back: Tensor


class Step:
    """The model of an arm at a base's shape, and one step of its training."""

    def __init__(
        self,
        shape: DecoderConfig,
        config: Config,
        counts: Counts,
        device: str,
        kernels: str = "auto",
    ):
        self.config, self.device, dtype = config, device, DTYPES[config.dtype]
        shape = shape if config.layers is None else shape.first(config.layers)
        made = model_config(config)
        fused = use_triton(kernels, device, dtype)
        with torch.device(device):
            self.decoder = Decoder(
                shape, made.lora, made.router, dtype, config.checkpointing, fused
            ).train()
            self.head = LinearScore(shape.hidden_size)
        randomise(self.decoder)
        named = {n: p for n, p in self.decoder.named_parameters() if p.requires_grad}
        self.parameters = named | {f"head.{n}": p for n, p in self.head.named_parameters()}
        c, self.draw = config, random.Random(0)
        self.optimizer = adamw(
            self.parameters, c.learning_rate, c.head_learning_rate, c.weight_decay
        )
        documents = c.embedding_batch * (1 + c.hard_negatives)
        sizes = self.sizes(c.embedding_batch, counts.query) + self.sizes(documents, counts.document)
        pairs = self.sizes(c.reranking_batch * c.group_size, counts.pair)
        self.texts = {"embedding": self.packed(sizes), "reranking": self.packed(pairs)}

    def sizes(self, count: int, mean: int) -> list[int]:
        """`count` log-normal lengths about `mean`, none above four times of it."""
        drawn = [min(4.0, self.draw.lognormvariate(0, SPREAD)) for _ in range(count)]
        scale = mean * count / sum(drawn)
        return [max(1, round(scale * size)) for size in drawn]

    def packed(self, sizes: list[int]) -> Texts:
        order = sorted(range(len(sizes)), key=sizes.__getitem__)
        ids = range(self.decoder.config.vocab_size)
        batch = pack([self.draw.choices(ids, k=sizes[i]) for i in order], self.device)
        back = torch.empty(len(order), dtype=torch.int64)
        back[order] = torch.arange(len(order))
        return Texts(batch, back.to(self.device))

    def pooled(self, texts: Texts, task: str) -> tuple[Tensor, list[Tensor]]:
        """Of each text, in the order before sorting; and the routing weights by layer."""
        batch, c = texts.batch, self.config
        tasks = torch.full((len(batch.lengths),), TASKS.index(task), device=self.device)
        pooling = c.embedding_pooling if task == "embedding" else c.reranking_pooling
        run = partial(self.decoder, batch, tasks)
        rows, weights = run_pooled(lambda only: run(only=only), batch, pooling)
        return rows[texts.back], weights

    def loss(self) -> Tensor:
        """Both tasks' losses and the routers' balance, as `train.loop.train` adds them."""
        c, terms, routing = self.config, [], []
        for task in c.tasks:
            rows, weights = self.pooled(self.texts[task], task)
            routing.append(weights)
            if task == "embedding":
                vectors = F.normalize(rows, dim=-1)
                at = torch.arange(c.embedding_batch, device=self.device)
                queries, documents = vectors[: len(at)], vectors[len(at) :]
                pairs, margins = torch.stack([at, at], 1), (c.temperature, c.false_negative_margin)
                terms.append(info_nce(queries, documents, at, pairs, *margins))
            else:
                scores = self.head(rows)
                terms.append(losses.RERANKING[c.reranking_loss](scores.view(-1, c.group_size)))
        if routing[0]:
            mixed = [torch.cat(layer) for layer in zip(*routing, strict=True)]
            terms.append(c.balance_weight * losses.balance(mixed, c.balance))
        return torch.stack(terms).sum()

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with strict():  # as `train.loop` has it
            self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip)
        self.optimizer.step()

    @torch.no_grad()
    def encode(self, texts: Texts) -> Tensor:
        """Within the decoder's `serving`."""
        return F.normalize(self.pooled(texts, "embedding")[0], dim=-1).cpu()


def measure(run: Callable[[], object], device: str, seconds: float) -> float:
    """Median seconds of a call, of as many as fit into `seconds`; the first warms up."""
    times: list[float] = []
    while len(times) < 2 or sum(times[1:]) + times[-1] < seconds:
        started = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def part(c: Config, option: Option, device: str) -> Config:
    """The arm in the dtype and with the batches that the probe takes: one chunk of the step's."""
    share = (CPU_SHARE if device == "cpu" else 1.0) / option.chunks
    return replace(
        c,
        steps=1,
        prefix=False,
        dtype=resolve_dtype("auto", device),
        checkpointing=option.checkpointing,
        embedding_batch=max(2, round(share * c.embedding_batch)),
        reranking_batch=max(1, round(share * c.reranking_batch)),
    )


def run(
    shape: DecoderConfig,
    c: Config,
    counts: Counts,
    option: Option,
    card: Card,
    device: str,
    seconds: float,
    kernels: str = "auto",
) -> dict:
    """Predicted and probed seconds of a step and of an encoding batch, and bytes on a card.

    Args:
        c: the arm. option: how it fits. card: that of `card_here`.
        seconds: of both together, the warming up left out.
    Returns:
        card, dtype and option; training, encoding: tokens, predicted and probed (s) and ratio, the
        probed over the predicted; memory: predicted and probed (bytes), None on a CPU.
    """
    small, whole = part(c, option, device), replace(option, chunks=1)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    step = Step(shape, small, counts, device, kernels)
    budget = CPU_BUDGET if device == "cpu" else CARD_BUDGET
    texts = step.packed(step.sizes(max(1, budget // counts.document), counts.document))
    found: dict = {"card": card, "dtype": small.dtype, "option": option.name, "memory": None}
    work = {
        "training": (
            step.step, sum(len(t.batch.input_ids) for t in step.texts.values()),
            costs.training(shape, small, counts, whole),
        ),
        "encoding": (
            lambda: step.encode(texts), len(texts.batch.input_ids),
            costs.forward(shape, small, len(texts.batch.input_ids), counts.document),
        ),
    }  # fmt: skip
    for what, (call, tokens, parts) in work.items():
        predicted = costs.duration(parts, card)
        with step.decoder.serving() if what == "encoding" else nullcontext():
            probed = measure(call, device, seconds / 2)
        ratio = probed / predicted
        found[what] = {"tokens": tokens, "predicted": predicted, "probed": probed, "ratio": ratio}
    if device != "cpu":
        expected = costs.needed(costs.memory(shape, small, counts, whole))
        found["memory"] = {"predicted": expected, "probed": torch.cuda.max_memory_allocated()}
    return found

"""A training step of Joint-Single: ours against transformers + peft with one LoRA, same texts.

Both take the study's own micro-batches (one embedding, one reranking), the same losses, clipping
and AdamW. The rival pads queries, documents and pairs each to their longest, and over a 16-bit base
stands with its adapters in the way that two rounds of each find fastest.
"""

import copy
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModel

import experiments
from bench import timing
from bench.encoding import cut_base
from kernels.info_nce import info_nce
from model import bases
from model.heads import LinearScore
from model.prefix import TextSet
from model.unimoer import UniMoER
from train import losses
from train.batches import TrainingData
from train.optim import adamw
from train.step import WORK, task_loss
from train.trial import Workbench
from trials import Config

STEP = {"embedding_batch": 8, "reranking_batch": 4}  # half a step of the study: minutes count here
SETTINGS = {
    "8 layers, all adapted": {"layers": 8, "adapter_layers": 0, "prefix": False},
    "16 layers, last 4 adapted": {"prefix": False},
    # What the study does from the second trial on: the states below layer 12 were kept before.
    "16 layers, last 4 adapted, prefix states at hand": {},
}
# How peft may keep adapters beside a base in 16 bit: in fp32, with x cast up to them (its default);
# the same under autocast, which casts them down; or in 16 bit, AdamW included.
WAYS = {
    "float32": ("fp32 adapters",),
    "bfloat16": ("fp32 adapters", "fp32 adapters under autocast", "bf16 adapters"),
    "float16": ("fp32 adapters", "fp32 adapters under autocast", "fp16 adapters"),
}


class Ours:
    """One step as `train.loop` makes it."""

    def __init__(self, model: UniMoER, data: TrainingData, config: Config):
        self.model, self.data, self.config = model.train(), data, config
        self.parameters = model.trained()
        rates = (config.learning_rate, config.head_learning_rate, config.weight_decay)
        self.optimizer = adamw(self.parameters, *rates)

    def loss(self, step: int) -> Tensor:
        return torch.stack([task_loss(task, self.model, self.data, step) for task in WORK]).sum()

    def step(self, step: int) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip)
        self.optimizer.step()
        return loss.item()


class Theirs(Ours):
    """The same step with transformers and peft: padded batches, one LoRA of the same rank."""

    def __init__(self, folder: Path, ours: Ours, way: str = "fp32 adapters"):
        self.data, self.config = ours.data, ours.config
        self.autocast = way.endswith("under autocast")
        self.narrow = ours.model.dtype
        c, self.device = ours.config, ours.model.device
        with tempfile.TemporaryDirectory() as place:
            cut = cut_base(folder, len(ours.model.decoder.layers), Path(place))
            base = AutoModel.from_pretrained(cut, dtype=ours.model.dtype).to(self.device)
        adapted = "|".join(map(str, range(c.adapter_layers, base.config.num_hidden_layers)))
        adapters = LoraConfig(
            r=c.ranks[0],
            lora_alpha=round(c.alpha_over_rank * c.ranks[0]),
            target_modules=rf"layers\.({adapted})\..*\.({'|'.join(c.targets)})",
        )
        wide = way.startswith("fp32")
        self.lora = get_peft_model(base, adapters, autocast_adapter_dtype=wide).train()
        assert isinstance(ours.model.head, LinearScore)
        self.head = copy.deepcopy(ours.model.head)  # both start from the same one
        named = {n: p for n, p in self.lora.named_parameters() if p.requires_grad}
        self.parameters = named | {f"head.{n}": p for n, p in self.head.named_parameters()}
        self.optimizer = adamw(
            self.parameters, c.learning_rate, c.head_learning_rate, c.weight_decay
        )

    def pooled(self, texts: TextSet, indices: list[int]) -> Tensor:
        """(B, D) fp32: the mean over each text's own tokens, padded to the longest."""
        rows = [torch.tensor(texts.ids[i]) for i in indices]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        mask = torch.arange(ids.shape[1], device=self.device) < lengths[:, None]
        with torch.autocast(self.device.type, self.narrow, enabled=self.autocast):
            hidden = self.lora(input_ids=ids, attention_mask=mask.long(), use_cache=False)[0]
        return (hidden.float() * mask[..., None]).sum(1) / lengths[:, None]

    def loss(self, step: int) -> Tensor:
        c, rows, groups = self.config, self.data.embedding(step), self.data.reranking(step)
        texts = self.data.embedding_texts
        queries, documents = (
            F.normalize(self.pooled(texts, indices), dim=-1)
            for indices in (rows.queries, rows.documents)
        )
        places = (rows.positive.to(self.device), rows.relevant.to(self.device))
        margins = (c.temperature, c.false_negative_margin)
        scores = self.head(self.pooled(self.data.reranking_texts, groups.pairs))
        ranked = losses.RERANKING[c.reranking_loss](scores.view(-1, groups.size))
        return info_nce(queries, documents, *places, *margins) + ranked


def run(
    bench: Workbench,
    base: str,
    rounds: int = 5,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    settings: dict[str, dict] = SETTINGS,
) -> list[dict]:
    """One row for each setting and dtype: tokens/s of a step, ours and theirs, and the ratio.

    Raises:
        ValueError: the losses of the first step differ, so the two would not do the same work.
    """
    rows, best = [], {}
    for name, changes in settings.items():
        for dtype in dtypes:
            fields = {"base": base, "dtype": dtype, "train_queries": 64, **STEP, **changes}
            config = experiments.config("kill_gate", "joint-single", "small", 0, **fields)
            rows.append(_row(bench, name, config, rounds, best))
    return rows


def _row(bench: Workbench, name: str, config: Config, rounds: int, best: dict[str, str]) -> dict:
    """best: dtype -> the rival's way, found where it is missing."""
    model = bench.model(config)
    data = TrainingData(bench.collection, model.tokenizer, config, bench.states(model, config))
    ours, dtype = Ours(model, data, config), config.dtype
    folder = bases.resolve(config.base, config.revision)
    ways, searched = (best[dtype],) if dtype in best else WAYS[dtype], {}
    rivals = {way: Theirs(folder, ours, way) for way in ways}
    with torch.no_grad():
        first = [float(side.loss(0)) for side in (ours, *rivals.values())]
    if max(first) - min(first) > (1e-3 if dtype == "float32" else 0.15):
        raise ValueError(f"{name} {dtype}: first losses {first} differ")
    work = [_tokens(data, step) for step in range(rounds)]
    if len(rivals) > 1:
        best[dtype], searched = timing.best(lambda way: rivals[way].step(0), ways, work[0])
    way = best.setdefault(dtype, ways[0])
    times = timing.seconds({"ours": ours.step, "theirs": rivals[way].step}, rounds)
    return {
        "what": f"train Joint-Single, {name}",
        "dtype": dtype,
        "against": f"transformers + peft, one LoRA, {way}",
        "unit": "tokens/s",
        "tokens": sum(work),
        **timing.against(times, work),
        **searched,
    }


def _tokens(data: TrainingData, step: int) -> int:
    """Real tokens of a step's texts, padding not counted."""
    rows = data.embedding(step)
    embedded = [data.embedding_texts.lengths[i] for i in rows.queries + rows.documents]
    return sum(embedded + [data.reranking_texts.lengths[i] for i in data.reranking(step).pairs])

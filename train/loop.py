"""The training loop: mixed steps, a log of JSON lines, checkpoints, the same end after a kill."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from kernels.info_nce import info_nce
from model import weights
from model.prefix import TextSet
from model.router import NOT_LEARNED
from model.unimoer import UniMoER
from train import losses, pcgrad
from train.batches import TrainingData
from train.optim import adamw, schedule
from train.start import Held
from trials import Config

# Called after each step with the step and its log line, to which it may add before it is written:
# what is in the log is there after a kill. What an analysis watches is passed in.
Callback = Callable[[int, dict], None]


class NonFiniteLoss(RuntimeError):
    """The loss or a gradient is NaN or infinite; the last checkpoint is kept."""


def _ordered(texts: TextSet, indices: list[int], model: UniMoER):
    """The batch of some texts sorted by length, and where each of `indices` went."""
    order = sorted(range(len(indices)), key=lambda i: texts.lengths[indices[i]])
    batch, states = texts.batch([indices[i] for i in order], model.device, model.dtype)
    back = torch.empty(len(order), dtype=torch.int64)
    back[order] = torch.arange(len(order))
    return batch, states, back.to(model.device)


def embedding_loss(
    model: UniMoER, data: TrainingData, step: int, seed: int | None = None
) -> tuple[Tensor, list[Tensor], list[str]]:
    """InfoNCE of the step's embedding micro-batch, its routing weights by layer, its query ids.

    seed: of the order of the batches, if not the config's.
    """
    rows, c = data.embedding(step, seed), data.config
    batch, states, back = _ordered(data.embedding_texts, rows.queries + rows.documents, model)
    vectors, routing = model.embed(batch, states)
    vectors = vectors[back]
    loss = info_nce(
        vectors[: len(rows.queries)],
        vectors[len(rows.queries) :],
        rows.positive.to(model.device),
        rows.relevant.to(model.device),
        c.temperature,
        c.false_negative_margin,
    )
    return loss, routing, rows.ids


def reranking_loss(
    model: UniMoER, data: TrainingData, step: int, seed: int | None = None
) -> tuple[Tensor, list[Tensor], list[str]]:
    """Listwise or pointwise loss of the step's reranking micro-batch; else as above."""
    if data.config.rerank_head == "interaction":
        return interaction_loss(model, data, step, seed)
    rows = data.reranking(step, seed)
    batch, states, back = _ordered(data.reranking_texts, rows.pairs, model)
    scores, routing = model.score(batch, states)
    loss = losses.RERANKING[data.config.reranking_loss](scores[back].view(-1, rows.size))
    return loss, routing, rows.ids


def interaction_loss(
    model: UniMoER, data: TrainingData, step: int, seed: int | None = None
) -> tuple[Tensor, list[Tensor], list[str]]:
    """rank + a dispersive + b dual + c similarity of the step's lists (jina-reranker-v3,
    arXiv 2509.25085, eq. 1); else as above."""
    rows, c = data.lists(step, seed), data.config
    count, t = len(rows.texts), c.list_temperature
    batch, _, back = _ordered(TextSet(rows.texts), list(range(count)), model)
    vectors, routing = model.marked(batch)
    vectors = F.normalize(vectors.unflatten(0, (count, -1))[back], dim=-1)  # (texts, K + 2, W)
    first, second = vectors[: len(rows.ids)], vectors[len(rows.ids) :, 1:-1]
    early, documents, query = first[:, 0], first[:, 1:-1], first[:, -1]
    positive = rows.positive.to(model.device)
    loss = losses.contrast(query, documents, positive, t)
    loss = loss + c.dispersive_weight * losses.dispersive(documents, t)
    loss = loss + c.dual_weight * losses.contrast(early, documents, positive, t)
    if c.similarity_weight:
        altered = torch.take_along_dim(second, rows.again.to(model.device)[..., None], 1)
        loss = loss + c.similarity_weight * losses.similarity(documents, altered, t)
    return loss, routing, rows.ids


TASK_LOSS = {"embedding": embedding_loss, "reranking": reranking_loss}


def routing_line(
    routing: dict[str, list[Tensor]], experts: tuple[str, ...], alarm: bool = True
) -> dict:
    """Mean weights by task, their entropy in nats, and an alarm when an expert is dead.

    The alarm names each expert whose mean weight over the whole mixed batch is below 0.01 in more
    than half of the layers.
    """
    line: dict = {}
    for task, layers in routing.items():
        stacked = torch.stack([w.detach().float().mean(0) for w in layers])  # (layers, E)
        line[f"weights_{task}"] = [round(v, 4) for v in stacked.mean(0).tolist()]
        entropy = torch.stack(
            [torch.special.entr(w.detach().float()).sum(-1).mean() for w in layers]
        )
        line[f"entropy_{task}"] = round(entropy.mean().item(), 4)
    layers = zip(*routing.values(), strict=True)
    mixed = torch.stack([torch.cat(layer).detach().float().mean(0) for layer in layers])
    dead = (mixed < 0.01).float().mean(0) > 0.5
    idle = [name for name, is_dead in zip(experts, dead.tolist(), strict=True) if is_dead]
    if alarm and idle:
        line["alarm"] = f"collapse: {', '.join(idle)} carry no weight"
    return line


def train(
    model: UniMoER,
    data: TrainingData,
    config: Config,
    place: Path,
    *,
    callback: Callback | None = None,
    title: str = "train",
) -> list[dict]:
    """Train experts, routers and head in place; return the log, one line per step.

    A joint step is one embedding and one reranking micro-batch, two forward passes and one
    backward. The random state of a step is a function of the seed and the step, so a run that
    continues from its checkpoint ends like one that was never stopped.

    Args:
        place: `<place>.log.jsonl` and `<place>.checkpoint/` are written beside it. The checkpoint
            is removed by `forget` when the caller has stored the trial's result.
    Raises:
        NonFiniteLoss: with the step and the batch's ids.
        ValueError: the checkpoint belongs to another config.
    """
    parameters = model.trained()
    held = Held(model, config.frozen)
    optimizer = adamw(
        parameters, config.learning_rate, config.head_learning_rate, config.weight_decay
    )
    routers = list(model.routers().values())
    seed = config.seed + config.seed_offset
    log_path, folder = _log_path(place), _checkpoint_folder(place)
    start, log = _resume(model, optimizer, parameters, config, folder, log_path)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    model.train()
    task_weight = {"embedding": config.embedding_weight, "reranking": config.reranking_weight}
    bar = tqdm(total=config.steps, initial=start, desc=title, unit="step", leave=False)
    with open(log_path, "a") as log_file, bar:
        for step in range(start, config.steps):
            torch.manual_seed(seed * 1_000_003 + step)
            share = schedule(step, config.steps, config.warmup)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
            for router in routers:
                router.anneal = 1 - step / config.steps
            line: dict = {"step": step, "learning_rate": config.learning_rate * share}
            rest = torch.zeros((), device=model.device)  # losses of no task
            routing, ids = {}, {}
            penalties: list[Tensor] = []
            weighted: dict[str, Tensor] = {}
            for task in config.tasks:
                loss, routing[task], ids[task] = TASK_LOSS[task](model, data, step)
                weighted[task] = task_weight[task] * loss
                penalties += [r.penalty for r in routers if r.penalty is not None]
                line[f"loss_{task}"] = loss.item()
            if routing[config.tasks[0]]:
                routed = [name != config.always_on for name in config.experts]
                layers = zip(*routing.values(), strict=True)
                mixed = [torch.cat(layer)[:, routed] for layer in layers]  # (B, routed experts)
                aux = losses.balance(mixed, config.balance)
                rest = rest + config.balance_weight * aux
                line["loss_balance"] = aux.item()
                if penalties:
                    rest = rest + config.penalty_weight * torch.stack(penalties).mean()
                # Where the router learns nothing, an idle expert is so by design.
                line |= routing_line(routing, config.experts, config.router not in NOT_LEARNED)
            optimizer.zero_grad(set_to_none=True)
            total = torch.stack(list(weighted.values())).sum() + rest
            if config.pcgrad:
                pcgrad.backward(weighted, rest, list(parameters.values()))
            else:
                total.backward()
            held.clear()
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.clip).item()
            line["gradient_norm"] = norm
            if not (math.isfinite(total.item()) and math.isfinite(norm)):
                kept = f"the last good checkpoint is in {folder}"
                kept = kept if folder.exists() else "no checkpoint was due yet"
                raise NonFiniteLoss(
                    f"step {step}: loss {total.item()}, gradient norm {norm}; batch {ids}; {kept}. "
                    "Lower learning_rate or clip, or look at these texts"
                )
            optimizer.step()
            held.restore()
            if callback is not None:
                callback(step, line)
            log.append(line)
            log_file.write(json.dumps(line) + "\n")
            log_file.flush()
            if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
                os.fsync(log_file.fileno())  # the log is never behind its checkpoint
                _save(optimizer, parameters, config, folder, step + 1)
            bar.update()
            bar.set_postfix({k[5:]: f"{v:.3f}" for k, v in line.items() if k.startswith("loss_")})
    model.eval()
    return log


def _log_path(place: Path) -> Path:
    return place.with_name(place.name + ".log.jsonl")


def _checkpoint_folder(place: Path) -> Path:
    return place.with_name(place.name + ".checkpoint")


def forget(place: Path) -> None:
    """Remove a finished trial's checkpoint and log; the result holds the curve."""
    shutil.rmtree(_checkpoint_folder(place), ignore_errors=True)
    _log_path(place).unlink(missing_ok=True)


def _save(optimizer, parameters: dict, config: Config, folder: Path, step: int) -> None:
    """One safetensors file, renamed into place: parameters, Adam's moments, step and config."""
    tensors = {}
    for name, parameter in parameters.items():
        tensors[f"parameter.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = torch.as_tensor(value)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"step": str(step), "config": json.dumps(config.to_json())}
    weights.save(tensors, folder / "state.safetensors", metadata)


@torch.no_grad()
def _resume(
    model: UniMoER, optimizer, parameters: dict, config: Config, folder: Path, log_path: Path
) -> tuple[int, list[dict]]:
    """Load the checkpoint if there is one; (first step to do, log of the steps before it)."""
    path = folder / "state.safetensors"
    if not path.exists():
        log_path.unlink(missing_ok=True)
        return 0, []
    metadata = weights.read_metadata(path)
    if json.loads(metadata["config"]) != json.loads(json.dumps(config.to_json())):
        raise ValueError(
            f"{path} belongs to a run with another config: remove {folder} to start anew"
        )
    step, tensors = int(metadata["step"]), load_file(path, device=str(model.device))
    for name, parameter in parameters.items():
        parameter.copy_(tensors[f"parameter.{name}"])
        optimizer.state[parameter] = {
            key: tensors[f"{key}.{name}"].cpu() if key == "step" else tensors[f"{key}.{name}"]
            for key in ("step", "exp_avg", "exp_avg_sq")
            if f"{key}.{name}" in tensors
        }
    lines = [json.loads(line) for line in log_path.read_text().splitlines()[:step]]
    part = log_path.with_name(log_path.name + ".part")
    part.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(part, log_path)
    return step, lines

"""The training loop: mixed steps, a log of JSON lines, checkpoints, the same end after a kill."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from eval.machine import peak_bytes
from eval.provenance import sources
from model import parallel, sharding, weights
from model.files import locked, write_text
from model.router import learned
from model.unimoer import UniMoER
from train import losses, pcgrad
from train.batches import TrainingData
from train.optim import adamw, schedule
from train.start import Held
from train.step import WORK, run
from trials import Config

# Called after each step with the step and its log line, to which it may add before it is written:
# what is in the log is there after a kill. What an analysis watches is passed in.
Callback = Callable[[int, dict], None]


STATE = "state.safetensors"


class NonFiniteLoss(RuntimeError):
    """The loss or a gradient is NaN or infinite; the last checkpoint is kept."""


def routing_line(
    routing: dict[str, list[Tensor]], experts: tuple[str, ...], alarm: bool = True
) -> dict:
    """Mean weights by task, their entropy in nats, and an alarm when an expert is dead.

    The alarm names each expert whose mean weight over the whole mixed batch is below 0.01 in more
    than half of the layers. routing: by task and layer, before experts are dropped: where the one
    that has nearly all is dropped, those that carry nothing have its weight.
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


@dataclass(frozen=True)
class StepLosses:
    """What a step's micro-batches come to, on the device.

    Attributes:
        weighted: task -> its loss at its weight. rest: losses of no task.
        carries: what a backward pass is followed by, see `train.step.run`.
        seen: the losses as the log has them. given: task -> a layer's weights (B, E) each, before
            experts were dropped; empty without a router.
        ids: task -> what its batch is made of. tokens: of all of them.
    """

    weighted: dict[str, Tensor]
    rest: Tensor
    carries: list[Callable[[], None]]
    seen: dict[str, Tensor]
    given: dict[str, list[Tensor]]
    ids: dict[str, list[str]]
    tokens: int

    def line(self, config: Config) -> dict:
        """What the log says of them; waits for the device."""
        line = {"tokens": self.tokens, **{name: x.item() for name, x in self.seen.items()}}
        if self.given:
            # Where the router learns nothing, an idle expert is so by design.
            alarm = learned(config.router, config.router_frozen)
            line |= routing_line(self.given, config.experts, alarm)
        return line


def step_losses(model: UniMoER, data: TrainingData, config: Config, step: int) -> StepLosses:
    """Run the step's micro-batch of each task, and what is lost by both together."""
    weight = {"embedding": config.embedding_weight, "reranking": config.reranking_weight}
    weighted, seen, routing, given, ids = {}, {}, {}, {}, {}
    penalties: list[Tensor] = []
    carries: list[Callable[[], None]] = []
    tokens = 0
    for task in config.tasks:
        work = WORK[task](data, step)
        made = run(model, work, config.cached_tokens)
        loss = work.loss(made.rows)
        weighted[task], seen[f"loss_{task}"] = weight[task] * loss, loss.detach()
        routing[task], given[task], ids[task] = made.routing, made.given, work.ids
        penalties += [rows.mean() for rows in made.penalties]
        carries.append(made.carry)
        tokens += work.tokens
    rest = torch.zeros((), device=model.device)
    routes = bool(routing[config.tasks[0]])
    if routes:
        routed = [name != config.always_on for name in config.experts]
        layers = zip(*routing.values(), strict=True)
        mixed = [torch.cat(layer)[:, routed] for layer in layers]  # (B, routed experts)
        balance = losses.balance(mixed, config.balance)
        rest, seen["loss_balance"] = rest + config.balance_weight * balance, balance.detach()
        if penalties:
            rest = rest + config.penalty_weight * torch.stack(penalties).mean()
    return StepLosses(weighted, rest, carries, seen, given if routes else {}, ids, tokens)


def train(
    model: UniMoER,
    data: TrainingData,
    config: Config,
    place: Path,
    *,
    callback: Callback | None = None,
    title: str = "train",
    origin: Mapping[str, Any] | None = None,
) -> list[dict]:
    """Train experts, routers and head in place; return the log, one line per step.

    A joint step is one embedding and one reranking micro-batch, two forward passes and one
    backward. The random state of a step is a function of the seed and the step, so a run that
    continues from its checkpoint ends like one that was never stopped, also in another number of
    processes. Of several, each has a share of every micro-batch (`train.step`), the gradients are
    added up, all take the same step, and rank 0 writes.

    Args:
        place: `<place>.log.jsonl` and `<place>.checkpoint/` are written beside it. The checkpoint
            is removed by `forget` when the caller has stored the trial's result.
        origin: what the run is of besides its config, such as the data's fingerprint; a checkpoint
            is gone on from only where that is the same.
    Raises:
        NonFiniteLoss: with the step and the batch's ids.
        ValueError: the checkpoint belongs to another config or origin, or not all processes see it.
    """
    parameters, writes = model.trained(), parallel.rank() == 0
    held = Held(model, config.frozen)
    optimizer = adamw(
        parameters, config.learning_rate, config.head_learning_rate, config.weight_decay
    )
    routers, scale = list(model.routers().values()), losses.LOSS_SCALE.get(model.dtype, 1.0)
    seed = config.seed + config.seed_offset
    log_path, folder = _log_path(place), _checkpoint_folder(place)
    earlier, began = before(place), time.perf_counter()
    codes = " ".join(sorted({*earlier.sources, sources()}))
    about = {"config": json.dumps(config.to_json()), "origin": json.dumps(dict(origin or {}))}
    start, log = _resume(model, optimizer, parameters, about, folder, log_path)
    sharding.renew(model.decoder)
    parallel.require_same(start, f"the step of {folder}, which must lie on a disk that all share,")
    log_path.parent.mkdir(parents=True, exist_ok=True)
    model.train()
    options = {"total": config.steps, "initial": start, "desc": title, "unit": "step"}
    bar = tqdm(**options, leave=False, disable=not writes)
    with open(log_path if writes else os.devnull, "a") as log_file, bar:
        for step in range(start, config.steps):
            torch.manual_seed(seed * 1_000_003 + step)
            share = schedule(step, config.steps, config.warmup)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
            for router in routers:
                router.anneal = 1 - step / config.steps
            made = step_losses(model, data, config, step)
            optimizer.zero_grad(set_to_none=True)
            total = torch.stack(list(made.weighted.values())).sum() + made.rest
            trained = list(parameters.values())
            backward = partial(
                _backward, carries=made.carries, parameters=trained, held=held, scale=scale
            )
            if config.pcgrad:
                pcgrad.backward(made.weighted, made.rest, trained, backward)
            else:
                backward(total, keep=False)
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.clip).item()
            line = {"step": step, "learning_rate": config.learning_rate * share}
            line |= made.line(config) | {"gradient_norm": norm}  # a card has all of its work by now
            if not (math.isfinite(total.item()) and math.isfinite(norm)):
                kept = f"the last good checkpoint is in {folder}"
                kept = kept if (folder / STATE).exists() else "no checkpoint was due yet"
                narrow = "; or take dtype float32, if fp16 is too narrow" if scale != 1 else ""
                raise NonFiniteLoss(
                    f"step {step}: loss {total.item()}, gradient norm {norm}; batch {made.ids}; "
                    f"{kept}. Lower learning_rate or clip, or look at these texts{narrow}"
                )
            optimizer.step()
            held.restore()
            sharding.renew(model.decoder)
            if callback is not None:
                with parallel.alone():  # what it measures is not to be shared out
                    callback(step, line)
            log.append(line)
            log_file.write(json.dumps(line) + "\n")
            log_file.flush()
            done = step + 1
            # The last one too: what follows, such as encoding a corpus, may take longer still.
            if writes and (done % config.checkpoint_every == 0 or done == config.steps):
                os.fsync(log_file.fileno())  # the log is never behind its checkpoint
                seconds = earlier.seconds + time.perf_counter() - began
                peak = max(earlier.peak_bytes, peak_bytes(str(model.device)))
                noted = {"seconds": f"{seconds}", "peak_bytes": f"{peak}", "sources": codes}
                _save(optimizer, parameters, about | noted, folder, done)
            bar.update()
            bar.set_postfix({k[5:]: f"{v:.3f}" for k, v in line.items() if k.startswith("loss_")})
    model.eval()
    return log


def _backward(
    loss: Tensor,
    keep: bool = True,
    *,
    carries: list[Callable[[], None]],
    parameters: Sequence[Tensor],
    held: Held,
    scale: float,
) -> None:
    """Put the loss's gradients into .grad: through all parts, added up over all processes, without
    those of what is held (which PCGrad would project by)."""
    with strict():
        (loss * scale).backward(retain_graph=keep)
        for carry in carries:
            carry()
    found = [p.grad for p in parameters if p.grad is not None]
    if scale != 1:
        for grad in found:
            grad /= scale
    parallel.add(found)
    held.clear()


@contextmanager
def strict() -> Iterator[None]:
    """Where deterministic algorithms are asked for, insist on them: with `warn_only` PyTorch leaves
    the backward pass of attention on a card as it is, and warns."""
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    if not torch.are_deterministic_algorithms_enabled() or not warns:
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def _log_path(place: Path) -> Path:
    return place.with_name(place.name + ".log.jsonl")


def _checkpoint_folder(place: Path) -> Path:
    return place.with_name(place.name + ".checkpoint")


def owned(place: Path) -> AbstractContextManager[None]:
    """Hold a trial's files: two processes that wrote them would mix their logs.

    Raises:
        ValueError: another process, but for those of the same job, is at this trial.
    """
    if parallel.rank():
        return nullcontext()
    busy = f"another process is at {place.name}: wait for it, or choose other ARMS or RUNS"
    return locked(_checkpoint_folder(place), busy)


@dataclass(frozen=True)
class Before:
    """What the steps took that a checkpoint holds: seconds, peak bytes, and the sources that made
    them (`eval.provenance`)."""

    seconds: float = 0.0
    peak_bytes: int = 0
    sources: tuple[str, ...] = ()


def before(place: Path) -> Before:
    """Of the trial's checkpoint; nothing where there is none."""
    path = _checkpoint_folder(place) / STATE
    if not path.exists():
        return Before()
    noted = weights.read_metadata(path)
    return Before(
        float(noted.get("seconds", 0)),
        int(noted.get("peak_bytes", 0)),
        tuple(noted.get("sources", "").split()),
    )


def forget(place: Path) -> None:
    """Remove a finished trial's checkpoint and log; the result holds the curve."""
    shutil.rmtree(_checkpoint_folder(place), ignore_errors=True)
    _log_path(place).unlink(missing_ok=True)


def _save(optimizer, parameters: dict, about: dict[str, str], folder: Path, step: int) -> None:
    """One safetensors file, renamed into place: parameters, Adam's moments, and what they are."""
    tensors = {}
    for name, parameter in parameters.items():
        tensors[f"parameter.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = torch.as_tensor(value)
    folder.mkdir(parents=True, exist_ok=True)
    weights.save(tensors, folder / STATE, about | {"step": str(step)})


@torch.no_grad()
def _resume(
    model: UniMoER,
    optimizer,
    parameters: dict,
    about: dict[str, str],
    folder: Path,
    log_path: Path,
) -> tuple[int, list[dict]]:
    """Load the checkpoint if there is one; (first step to do, log of the steps before it)."""
    path = folder / STATE
    writes = parallel.rank() == 0
    if not path.exists():
        if writes:
            log_path.unlink(missing_ok=True)
        return 0, []
    metadata = weights.read_metadata(path)
    for what, text in about.items():
        was, now = json.loads(metadata.get(what, "{}")), json.loads(text)
        if what == "config":  # of another version of this code
            was = Config.completed(was)
        if other := [f"{k}: {was.get(k)!r} there, {now.get(k)!r} here"
                     for k in was | now if was.get(k) != now.get(k)]:  # fmt: skip
            raise ValueError(
                f"{path} belongs to a run with another {what} ({', '.join(other)}): remove "
                f"{folder} to start anew"
            )
    step, tensors = int(metadata["step"]), load_file(path, device=str(model.device))
    for name, parameter in parameters.items():
        parameter.copy_(tensors[f"parameter.{name}"])
        optimizer.state[parameter] = {
            key: tensors[f"{key}.{name}"].cpu() if key == "step" else tensors[f"{key}.{name}"]
            for key in ("step", "exp_avg", "exp_avg_sq")
            if f"{key}.{name}" in tensors
        }
    text = log_path.read_text() if log_path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines()[:step]]
    if [line["step"] for line in lines] != list(range(step)):
        raise ValueError(
            f"{log_path}: expected the lines of the steps 0 to {step - 1}, which {path} has made, "
            f"found {len(lines)} that are not these: remove {folder} to start anew"
        )
    if not writes:
        return step, lines
    write_text(log_path, "".join(json.dumps(line) + "\n" for line in lines))
    return step, lines

"""Where a trial starts: parts of a model as they were trained elsewhere, merged, held fixed."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from model import weights
from model.lora import LinearGroup, LoRAConfig
from model.saved import read_config
from model.unimoer import UniMoER
from trials import Config

Piece = tuple[Tensor, Tensor, float]  # A (R, D), B (O, R), s = alpha / r; its change is s B A


def check_starts(trials: list[tuple[str, Config]], folder: Path) -> None:
    """Raise ValueError if a trial starts from one that is neither there nor run before it."""
    known = set()
    for arm, config in trials:
        for part, others in config.starts().items():
            for source in others:
                place = folder / source / f"seed{config.seed}.model"
                if (source, config.seed) not in known and not place.exists():
                    raise ValueError(
                        f"{arm}: {part} starts from {source}, and there is no {place}: run "
                        f"{source} too, or before"
                    )
        known.add((arm, config.seed))


def model_of(path: Path) -> str | None:
    """What the trained model of a result is, `weights.revision`; None where it is gone."""
    folder = path.with_suffix(".model")
    return weights.revision(folder) if folder.exists() else None


def started_from(config: Config, place: Path) -> dict[str, str | None]:
    """arm -> its `model_of`, of the arms that this trial begins as. place: of the trial's files,
    with any suffix."""
    arms = dict.fromkeys(arm for sources in config.starts().values() for arm in sources)
    return {arm: model_of(place.parent.parent / arm / f"seed{config.seed}.json") for arm in arms}


@torch.no_grad()
def begin(model: UniMoER, config: Config, place: Path) -> dict[str, float]:
    """Put into the parts that `config.start` names what other arms have made of theirs.

    An arm with several experts gives the one of the part's name. From one arm the parameters are
    copied as they are. Changes of several are merged: `linear` adds them, each times
    `merge_weight`, which the sum of their ranks holds exactly; `ties` merges them as `ties` does
    and keeps what the part's rank can hold.

    Args:
        place: runs/<experiment>/<setting>/<arm>/seed<k>; the arms lie beside that one.
    Returns:
        part -> the share of the merged changes' energy (squared norm) that was kept.
    Raises:
        ValueError: an arm is not trained, was trained on another base, or does not fit.
    """
    assert model.config.lora is not None
    lora, kept = model.config.lora, {}
    for part, arms in config.starts().items():
        folders = [place.parent.parent / arm / f"{place.name}.model" for arm in arms]
        for folder in folders:
            _check(folder, model)
        if part == "head":
            if len(folders) > 1:
                raise ValueError(f"start: a head is taken from one arm, got {arms}")
            tensors = load_file(folders[0] / "heads.safetensors", device=str(model.device))
            for name, parameter in model.head.named_parameters():
                parameter.copy_(tensors[f"head.{name}"])
            continue
        at = lora.slices()[part]
        index = lora.experts.index(part)
        rank, scale = lora.ranks[index], lora.scales[index]
        found = [pieces(folder, part, str(model.device)) for folder in folders]
        whole = held = 0.0
        unused = {key for of in found for key in of}
        for prefix, group in model.named_modules():
            if not isinstance(group, LinearGroup):
                continue
            for name in group.adapted_names:
                parts = [of[prefix, name] for of in found if (prefix, name) in of]
                if len(parts) < len(found):
                    raise ValueError(f"start: {folders} do not all adapt {prefix}.{name}")
                unused.discard((prefix, name))
                a, b, before, after = _merged(parts, rank, scale, config)
                if a.shape[0] != rank:
                    raise ValueError(
                        f"start: {part} has rank {rank}, but {' + '.join(arms)} make {a.shape[0]}"
                    )
                group.lora_A[name][at] = a.to(group.lora_A[name].dtype)
                group.lora_B[name][:, at] = b.to(group.lora_B[name].dtype)
                whole, held = whole + before, held + after
        if unused:
            prefix, name = min(unused)
            raise ValueError(
                f"start: {folders} adapt {prefix}.{name} too, which this arm does not: give it "
                "their adapter_layers, targets and layers"
            )
        kept[part] = held / whole if whole else 1.0
    return kept


def _check(folder: Path, model: UniMoER) -> None:
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"there is no trained model {folder}, from which this arm starts: run that arm first "
            "(ARMS= with both, or none)"
        )
    theirs = read_config(folder)[1]["fingerprint"]
    if theirs != model.identity["fingerprint"]:
        raise ValueError(
            f"{folder} was trained on a base with fingerprint {theirs}, this one has "
            f"{model.identity['fingerprint']}: run it again"
        )


def pieces(folder: Path, part: str, device: str = "cpu") -> dict[tuple[str, str], Piece]:
    """(group, projection) -> the change that one expert of a saved model makes.

    part: its name; where the model has one expert, that one whatever its name.
    """
    lora = read_config(folder)[0].lora
    assert isinstance(lora, LoRAConfig)
    if len(lora.experts) > 1 and part not in lora.experts:
        raise ValueError(f"{folder} has the experts {lora.experts}, none of them {part!r}")
    expert = part if part in lora.experts else next(iter(lora.experts))
    at, index = lora.slices()[expert], lora.experts.index(expert)
    tensors, found = load_file(folder / "adapters.safetensors", device=device), {}
    for key, a in tensors.items():
        prefix, middle, name = key.rpartition(".lora_A.")
        if middle:
            b = tensors[f"{prefix}.lora_B.{name}"]
            found[prefix, name] = (a[at], b[:, at], lora.scales[index])
    return found


def _merged(
    pieces: Sequence[Piece], rank: int, scale: float, config: Config
) -> tuple[Tensor, Tensor, float, float]:
    """A and B of the merged change at this scale, its energy and how much of that they hold."""
    if len(pieces) == 1:
        a, b, _ = pieces[0]
        return a, b, 1.0, 1.0
    if config.merge == "linear":
        a = torch.cat([a for a, _, _ in pieces])
        b = torch.cat([config.merge_weight * s / scale * b for _, b, s in pieces], 1)
        return a, b, 1.0, 1.0
    changes = [s * (b.double() @ a.double()) for a, b, s in pieces]
    merged = config.merge_weight * ties(changes, config.merge_density)
    u, s, v = torch.linalg.svd(merged, full_matrices=False)
    energy = s.square()
    rows = min(rank, len(s))  # a linear may be narrower than the rank
    a, b = merged.new_zeros(rank, v.shape[1]), merged.new_zeros(len(u), rank)
    a[:rows], b[:, :rows] = v[:rows], u[:, :rows] * s[:rows] / scale
    return a, b, energy.sum().item(), energy[:rank].sum().item()


def ties(changes: Sequence[Tensor], density: float) -> Tensor:
    """TIES-merging (arXiv 2306.01708) of changes of one weight, with lambda = 1.

    Of each change the `density` largest entries by magnitude are kept; each entry elects the sign
    of their sum; what agrees with it is averaged. The paper trims over all weights together, this
    weight by weight, so that no projection is trimmed away whole.
    """
    trimmed = []
    for change in changes:
        count = max(int(density * change.numel()), 1)
        top = change.abs().flatten().topk(count).indices
        mask = torch.zeros_like(change).flatten()
        mask[top] = 1
        trimmed.append(change * mask.view_as(change))
    stack = torch.stack(trimmed)
    sign = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    agree = stack.sign() == sign
    return (stack * agree).sum(0) / agree.sum(0).clamp(min=1)


class Held:
    """Parts that training leaves as they are: experts, which share tensors with others, or head.

    `clear` after each backward pass, so that they take no part in the gradient's norm; `restore`
    after each step, since weight decay moves what has no gradient.
    """

    @torch.no_grad()
    def __init__(self, model: UniMoER, names: Sequence[str]):
        self.parts: list[tuple[torch.nn.Parameter, tuple, Tensor]] = []
        slices = model.config.lora.slices() if model.config.lora else {}
        for name in names:
            if name == "head":
                self.parts += [(p, (...,), p.clone()) for p in model.head.parameters()]
                continue
            for group in model.modules():
                if isinstance(group, LinearGroup):
                    at = slices[name]
                    for a, b in zip(group.lora_A.values(), group.lora_B.values(), strict=True):
                        self.parts += [(a, (at,), a[at].clone())]
                        self.parts += [(b, (slice(None), at), b[:, at].clone())]

    @property
    def count(self) -> int:
        """How many numbers are held."""
        return sum(kept.numel() for _, _, kept in self.parts)

    def clear(self) -> None:
        for parameter, at, _ in self.parts:
            if parameter.grad is not None:
                parameter.grad[at] = 0

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, at, kept in self.parts:
            parameter[at] = kept

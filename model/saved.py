"""A saved model: one folder with config.json, adapters.safetensors and heads.safetensors."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from model import weights
from model.config import ModelConfig
from model.files import read_json, write_text

FORMAT = 1
CONFIG, ADAPTERS, HEADS = "config.json", "adapters.safetensors", "heads.safetensors"


def write(
    folder: Path,
    config: ModelConfig,
    identity: dict[str, str | None],
    tensors: Mapping[str, Tensor],
) -> None:
    """Write a folder. Each file is renamed into place whole; config.json goes first and comes last,
    so a folder that was being written over when the process died is an error, not a mixture.

    Args:
        identity: of the base, from `bases.identity`.
        tensors: all that is trained; names that begin with "head." are the heads.
    """
    folder.mkdir(parents=True, exist_ok=True)
    heads = {name: t.detach() for name, t in tensors.items() if name.startswith("head.")}
    adapters = {name: t.detach() for name, t in tensors.items() if name not in heads}
    (folder / CONFIG).unlink(missing_ok=True)
    weights.save(adapters, folder / ADAPTERS)
    weights.save(heads, folder / HEADS)
    record = {"format": FORMAT, "model": asdict(config), "identity": identity}
    write_text(folder / CONFIG, json.dumps(record, indent=2) + "\n")


def name_of(folder: Path | str) -> str:
    """What a saved model is called in results, after its folder: `joint-moe-seed0`."""
    place = Path(folder).resolve()
    return f"{place.parent.name}-{place.stem}"


def read_config(folder: Path) -> tuple[ModelConfig, dict[str, str | None]]:
    """The config and the identity of the base it was trained on.

    Raises:
        ValueError: config.json is missing, or not what `write` writes.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{path} is missing: expected a folder written by save_pretrained")
    record = read_json(path, "save it again, or copy it again")
    if record.get("format") != FORMAT:
        raise ValueError(f"{path}: format {record.get('format')!r}, expected {FORMAT}")
    try:
        identity = {key: record["identity"][key] for key in ("name", "revision", "fingerprint")}
        return ModelConfig.from_json(record["model"]), identity
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not what save_pretrained writes: {error!r}") from error


def where(folder: Path, base: str) -> str:
    """The folder of the base of a saved model, which may have been moved together with what this
    process was started in. (Whether it is that base is told by its fingerprint, later.)

    Raises:
        ValueError: there is none.
    """
    parts = Path(base).parts[1:]
    for place in (Path(base), *(Path(*parts[at:]) for at in range(len(parts)))):
        if place.is_dir():
            return str(place)
    raise ValueError(
        f"{folder} was trained on the base in {base}, and there is no such folder: if it lies "
        f"elsewhere, UniMoER.from_pretrained({str(folder)!r}, base=...) takes it"
    )


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All that was trained. Raises ValueError for a truncated or foreign file, by name."""
    tensors = {}
    for name in (ADAPTERS, HEADS):
        weights.read_header(folder / name)
        tensors |= load_file(folder / name)
    return tensors

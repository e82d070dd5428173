"""The tiny collection, and what several files make of it: runs, saved models, mined negatives."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eval.collections import Collection, load
from experiments import Config
from model.unimoer import UniMoER
from tests.train.mined import WIDE
from tests.train.same import Parameters
from tests.train.tiny import NOISY_MOE, build, tiny_config, write_collection
from train.loop import Callback, train
from train.mining import LEXICAL, mine
from train.trial import model_config


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BEIR folder that nobody writes into."""
    return write_collection(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def collection(tiny_data: Path) -> Collection:
    return load(str(tiny_data))


@pytest.fixture(scope="module")
def tiny(tiny_base: Path, tiny_data: Path) -> Config:
    return tiny_config(tiny_base, tiny_data)


@pytest.fixture
def noisy(tiny: Config) -> Config:
    return replace(tiny, **NOISY_MOE)


@pytest.fixture(scope="module")
def run(collection: Collection) -> Callable[..., tuple[list[dict], Parameters]]:
    """Train a new model; its log and its trained parameters."""

    def run(
        config: Config, place: Path, callback: Callback | None = None
    ) -> tuple[list[dict], Parameters]:
        model, data = build(config, collection)
        log = train(model, data, config, place, callback=callback)
        return log, {name: p.detach().clone() for name, p in model.trained().items()}

    return run


@pytest.fixture(scope="module")
def unbroken(run, tiny, tmp_path_factory) -> tuple[list[dict], Parameters]:
    """The noisy run that nothing has disturbed."""
    return run(replace(tiny, **NOISY_MOE), tmp_path_factory.mktemp("unbroken") / "seed0")


@pytest.fixture(scope="module")
def folders(
    tiny_base: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """Two saved models, whose experts differ."""
    made = []
    for seed in (0, 1):
        model = UniMoER(model_config(tiny_config(tiny_base, tiny_data)), seed=seed)
        with torch.no_grad():
            for name, parameter in model.trained().items():
                if ".lora_B" in name:
                    generator = torch.Generator().manual_seed(seed)
                    parameter.normal_(std=0.1, generator=generator)
        place = tmp_path_factory.mktemp("saved") / "arm" / f"seed{seed}.model"
        model.save_pretrained(place)
        made.append(str(place))
    return made


@pytest.fixture(scope="module")
def mined(collection: Collection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mined") / "out"
    mine(folder, collection, WIDE, LEXICAL)
    return folder

"""A saved model is the same once loaded; a damaged folder, or one of another base, is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import weights
from model.router import ROUTES, SIMILARITY, RouterConfig
from model.tokens import Prompts
from model.unimoer import UniMoER
from tests.model.made import A_NAME, LORA, QUERY, TEXTS, make


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> UniMoER:
    return make(tiny_base)


@pytest.mark.parametrize(
    "changes",
    [
        {"router": RouterConfig(kind, always_on="shared")}
        for kind in sorted(set(ROUTES) - set(SIMILARITY))
    ]
    + [
        {"router": None},
        {"lora": None, "router": None},
        {"rerank_head": "yes_no", "reranking_pooling": "mean"},
        {"causal": False, "embedding_pooling": "first"},
        {"layers": 2, "dtype": "bfloat16", "prompts": Prompts(query="Find:{query}")},
        {"dtype": "float64", "lora": replace(LORA, targets=("q_proj", "down_proj"))},
    ],
    ids=lambda changes: "-".join(getattr(v, "kind", str(v)[:8]) for v in changes.values()),
)
def test_saved_and_loaded_is_identical(tiny_base: Path, tmp_path: Path, changes: dict) -> None:
    model = make(tiny_base, **changes)
    model.save_pretrained(tmp_path / "saved")
    loaded = UniMoER.from_pretrained(tmp_path / "saved")
    assert loaded.config == model.config
    assert not loaded.training, "what is loaded is ready for use: no dropout, no noise"
    assert loaded.trained().keys() == model.trained().keys()
    for name, parameter in model.trained().items():
        assert torch.equal(loaded.trained()[name], parameter), name
    assert torch.equal(loaded.encode_query([QUERY]), model.encode_query([QUERY]))
    assert torch.equal(loaded.encode_document(TEXTS), model.encode_document(TEXTS))
    assert loaded.rank(QUERY, TEXTS) == model.rank(QUERY, TEXTS)
    plain = UniMoER(model.config)
    assert not torch.equal(plain.predict([(QUERY, "a")]), model.predict([(QUERY, "a")])) or (
        not model.trained()
    ), "an untrained model must give something else"


def test_saved_folder_holds_the_adapters_and_no_base(model: UniMoER, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.json",
        "adapters.safetensors",
        "heads.safetensors",
    }
    adapters = load_file(tmp_path / "adapters.safetensors")
    assert not [name for name in adapters if "bordered" in name or "embed_tokens" in name]
    assert len(adapters) == 3 * (7 * 2 + 5), "three layers: A and B of seven, a router of five"
    assert set(load_file(tmp_path / "heads.safetensors")) == {
        "head.linear.weight",
        "head.linear.bias",
    }
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["model"]["prompts"]["query"] == model.config.prompts.query


def test_saving_over_an_older_one_replaces_it(tiny_base: Path, tmp_path: Path) -> None:
    make(tiny_base, lora=None, router=None).save_pretrained(tmp_path)
    model = make(tiny_base)
    model.save_pretrained(tmp_path)
    loaded = UniMoER.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(TEXTS), model.encode(TEXTS))


def test_another_base_is_refused(
    model: UniMoER, make_base: Callable[..., Path], tmp_path: Path
) -> None:
    """Same shapes, other weights: nothing but the fingerprint can tell."""
    model.save_pretrained(tmp_path)
    other = make_base(seed=1)
    with pytest.raises(ValueError, match="give the original base"):
        UniMoER.from_pretrained(tmp_path, base=str(other))
    moved = make_base()  # the same content in another place
    loaded = UniMoER.from_pretrained(tmp_path, base=str(moved))
    assert torch.equal(loaded.encode(TEXTS), model.encode(TEXTS))


def test_a_base_given_by_a_relative_path_is_found_from_elsewhere(
    make_base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`bases/tiny` looks like an id of the hub."""
    (tmp_path / "bases").mkdir()
    make_base().rename(tmp_path / "bases" / "tiny")
    monkeypatch.chdir(tmp_path)
    model = make(Path("bases/tiny"))
    model.save_pretrained(tmp_path / "saved")
    assert model.config.base == "bases/tiny", "what is trained is called as it was asked for"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = UniMoER.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.encode(TEXTS), model.encode(TEXTS))
    moved = (tmp_path / "bases" / "tiny").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"bases/tiny, and there is no such folder.*base=\.\.\."):
        UniMoER.from_pretrained(tmp_path / "saved")
    loaded = UniMoER.from_pretrained(tmp_path / "saved", base="../moved")
    assert moved.is_dir() and torch.equal(loaded.encode(TEXTS), model.encode(TEXTS))


def test_a_base_that_moves_with_the_models_is_found(
    make_base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repository that was copied to another machine; and it is the same model there."""
    home = tmp_path / "home"
    (home / "bases").mkdir(parents=True)
    make_base().rename(home / "bases" / "tiny")
    monkeypatch.chdir(home)
    model = make(Path("bases/tiny"))
    model.save_pretrained(home / "saved")
    mark = weights.revision(home / "saved")
    home.rename(tmp_path / "copied")
    monkeypatch.chdir(tmp_path / "copied")
    loaded = UniMoER.from_pretrained("saved")
    assert torch.equal(loaded.encode(TEXTS), model.encode(TEXTS))
    loaded.save_pretrained("again")
    assert weights.revision("again") == mark == weights.revision("saved")
    assert str(tmp_path) in (tmp_path / "copied" / "again" / "config.json").read_text()


@pytest.mark.parametrize("what", ["missing", "unexpected", "shape"])
def test_tensors_that_do_not_fit(model: UniMoER, tmp_path: Path, what: str) -> None:
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapters.safetensors"
    tensors = load_file(path)
    if what == "missing":
        del tensors[A_NAME]
    elif what == "unexpected":
        tensors["decoder.layers.9.x"] = torch.zeros(1)
    else:
        tensors[A_NAME] = tensors[A_NAME][:-1].clone()
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"{what}: ") as error:
        UniMoER.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)
    expected = {"missing": A_NAME, "unexpected": "layers.9.x", "shape": "(8, 32), expected (9, 32)"}
    assert expected[what] in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "adapters.safetensors", "heads.safetensors"])
def test_absent_files_are_named(model: UniMoER, tmp_path: Path, name: str) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=name):
        UniMoER.from_pretrained(tmp_path)


def test_truncated_adapters_are_named(model: UniMoER, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapters.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"adapters.safetensors is truncated"):
        UniMoER.from_pretrained(tmp_path)


def test_another_format_is_refused(model: UniMoER, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        UniMoER.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", [
    lambda r: r["identity"].pop("fingerprint"), lambda r: r["model"].update(lora=[]),
    lambda r: r["model"].update(dtype="int4"), lambda r: r["model"].update(unknown=1),
])  # fmt: skip
def test_a_damaged_config_is_named(model: UniMoER, tmp_path: Path, damage: Callable) -> None:
    model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    damage(record)
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="config.json is not what save_pretrained writes"):
        UniMoER.from_pretrained(tmp_path)

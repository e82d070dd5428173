"""jina-reranker-v3's scoring, derived once more with transformers on a tiny random Qwen3."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Qwen3Model

from eval import jina
from model import bases
from model.listwise import SYSTEM
from model.unimoer import UniMoER
from tests.eval import qwen

SPECIAL = (*qwen.CHAT, "<|embed_token|>", "<|rerank_token|>")
QUERY = "what is the capital of France?"
DOCUMENTS = [
    "Paris is the capital of France.",
    "\nA river: the Seine, 777 km.  ",
    "",
    "<|embed_token|>Lyon<|rerank_token|> is no capital",
    "def capital(country): return {'France': 'Paris'}[country]",
]


def prompt(query: str, documents: list[str], instruction: str = "") -> str:
    """The published template, written out again."""
    lines = ["<|im_start|>system", f"{SYSTEM}<|im_end|>", "<|im_start|>user"]
    lines += [
        f"I will provide you with {len(documents)} passages, each indicated by a numerical "
        f"identifier. Rank the passages based on their relevance to query: {query}"
    ]
    lines += ["<instruct>", instruction, "</instruct>"] if instruction else []
    for i, document in enumerate(documents):
        lines += [f'<passage id="{i}">', f"{document}<|embed_token|>", "</passage>"]
    lines += ["<query>", f"{query}<|rerank_token|>", "</query><|im_end|>"]
    lines += ["<|im_start|>assistant", "<think>", "", "</think>", "", ""]
    return "\n".join(lines)


@pytest.fixture(scope="module")
def folder(make_base: Callable[..., Path]) -> Path:
    """A tiny checkpoint with the files, tensors and tokens of the published one."""
    made = qwen.tokenizer([SYSTEM, prompt(QUERY, DOCUMENTS), *DOCUMENTS] * 3, SPECIAL)
    place = make_base(model_type="qwen3", vocab_size=made.get_vocab_size(), num_hidden_layers=3)
    made.save(str(place / "tokenizer.json"))
    tensors = load_file(place / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name, width in (("projector.0.weight", 32), ("projector.2.weight", 512)):
        tensors[name] = torch.randn(512, width, generator=generator) * width**-0.5
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return place


@pytest.fixture(scope="module")
def marks(folder: Path) -> tuple[int, int]:
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    document, query = (made.token_to_id(token) for token in SPECIAL[3:])
    assert document is not None and query is not None
    return document, query


@pytest.fixture(scope="module")
def model(folder: Path, marks: tuple[int, int]) -> UniMoER:
    return jina.load(str(folder), marks=marks)


@pytest.fixture(scope="module")
def derived(folder: Path, marks: tuple[int, int]) -> Callable[..., Tensor]:
    """derived(query, documents, block, instruction) -> cosines, from the text of the prompt on."""
    theirs = Qwen3Model.from_pretrained(folder, dtype=torch.float32).eval()
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tensors = load_file(folder / "model.safetensors")
    first, second = (tensors[f"projector.{at}.weight"].double() for at in (0, 2))

    @torch.no_grad()
    def derive(query: str, documents: list[str], block: int, instruction: str = "") -> Tensor:
        found, asked, weights = [], [], []
        for at in range(0, len(documents), block):
            text = prompt(query, documents[at : at + block], instruction)
            ids = torch.tensor(own.encode(text).ids)
            hidden = theirs(ids[None]).last_hidden_state[0].double()
            d, q = ((first @ hidden[ids == mark].T).relu().T @ second.T for mark in marks)
            assert len(d) == len(documents[at : at + block]) and len(q) == 1
            cosine = (d @ q[0]) / d.norm(dim=1) / q[0].norm()
            found.append(d)
            asked.append(q[0])
            weights.append((1 + cosine.max()) / 2)
        shares = torch.stack(weights)[:, None]
        query_vector = (shares * torch.stack(asked)).sum(0) / shares.sum()
        every = torch.cat(found)
        return (every @ query_vector) / every.norm(dim=1) / query_vector.norm()

    return derive


def test_the_scores_are_the_published_ones(model: UniMoER, derived: Callable[..., Tensor]) -> None:
    clean = [text.replace(SPECIAL[3], "").replace(SPECIAL[4], "") for text in DOCUMENTS]
    expected = derived(QUERY, clean, 125)
    [found] = model.score_lists([(QUERY, DOCUMENTS)])
    assert found.std() > 1e-3
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    for i, relevance in model.rank(QUERY, DOCUMENTS):
        assert relevance == pytest.approx((1 + expected[i].item()) / 2, abs=1e-5)
    alone = derived(QUERY, [clean[0]], 125)
    torch.testing.assert_close(model.score_lists([(QUERY, clean[:1])])[0].double(), alone,
                               rtol=0, atol=1e-5)  # fmt: skip
    assert (alone - expected[0]).abs() > 1e-4  # a score depends on the company


def test_an_instruction_is_read_where_it_was_published(model: UniMoER, derived: Callable) -> None:
    asked = "Given a question, rank by what answers it."
    expected = derived(QUERY, DOCUMENTS[:3], 125, asked)
    [found] = model.score_lists([(QUERY, DOCUMENTS[:3])], instruction=asked)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert (expected - derived(QUERY, DOCUMENTS[:3], 125)).abs().max() > 1e-4
    pairs = [(QUERY, text) for text in DOCUMENTS[:3]]
    assert torch.equal(model.score_pairs(pairs, instruction=asked), found)


def test_more_than_125_documents_make_blocks(model: UniMoER, derived: Callable) -> None:
    documents = [f"no {i}" for i in range(125)] + ["the capital", "France"]
    expected = derived(QUERY, documents, 125)
    [found] = model.score_lists([(QUERY, documents)])
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    # The query's vector is that of both blocks: it differs from what each says by itself.
    apart = derived(QUERY, documents[125:], 125)
    assert (expected[125:] - apart).abs().max() > 1e-4


def test_a_long_document_is_cut_to_2048_tokens(model: UniMoER, derived: Callable) -> None:
    fast = model.tokenizer.fast
    long = "no river " * 2000
    ids = fast.encode(long).ids
    assert len(ids) > jina.DOCUMENT_TOKENS
    cut = fast.decode(ids[: jina.DOCUMENT_TOKENS])
    expected = derived(QUERY, [cut, "Paris"], 125)
    [found] = model.score_lists([(QUERY, [long, "Paris"])])
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_the_command_writes_a_model(
    folder: Path, marks: tuple[int, int], model: UniMoER, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(jina, "load", partial(jina.load, marks=marks))
    out = tmp_path / "jina"
    assert jina.main(["--base", str(folder), "--dtype", "float32", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert set(load_file(out / "heads.safetensors")) == {
        "head.projector.0.weight", "head.projector.2.weight",
    }  # fmt: skip
    loaded = UniMoER.from_pretrained(out)
    assert loaded.rank(QUERY, DOCUMENTS) == model.rank(QUERY, DOCUMENTS)
    assert json.loads((out / "config.json").read_text())["model"]["list_tokens"] == 131072


def test_what_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    def absent(*args: object, **options: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(bases, "snapshot_download", absent)
    assert jina.main(["--out", str(tmp_path / "out")]) == 2
    assert "this baseline needs jinaai/jina-reranker-v3: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_model_is_refused(tiny_base: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"is no jinaai/jina-reranker-v3.*\(-1, -2\) and no proj"):
        jina.load(str(tiny_base))
    with pytest.raises(ValueError, match=r"the marks at \(151670, 151671\) in its tokenizer"):
        jina.load(str(folder))


def test_a_projector_of_another_width_is_refused(folder: Path, make_base: Callable, marks) -> None:
    tensors = load_file(folder / "model.safetensors")
    place = make_base(model_type="qwen3", num_hidden_layers=3,
                      vocab_size=len(tensors["model.embed_tokens.weight"]))  # fmt: skip
    tensors["projector.2.weight"] = torch.zeros(256, 512)
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    (place / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match=r"projector.2.weight is \(256, 512\)"):
        jina.load(str(place), marks=marks)

"""The instruction of a task of mteb: where it goes, and what is kept of it beside the scores."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mteb.mocks.mock_tasks import retrieval
from mteb.types import PromptType

from eval import mteb_adapter
from eval.mteb_adapter import CrossEncoder, Encoder
from eval.provenance import sources
from model.config import ModelConfig
from model.prefix import TextSet
from model.tokens import Prompts
from model.unimoer import UniMoER

pytestmark = pytest.mark.filterwarnings("ignore")  # mteb's own
OWN = Prompts("Instruct: {instruction}\nQuery:{query}", "{document}",
              "{instruction} {query} {document}", "own")  # fmt: skip
AT: dict[str, Any] = {"hf_split": "test", "hf_subset": "default"}
QUERIES, DOCUMENTS = ["rare1", "ba"], ["ko", "mi"]


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> UniMoER:
    return UniMoER(ModelConfig(base=str(tiny_base), prompts=OWN))


def task(prompt: Any) -> Any:
    made = retrieval.MockRetrievalTask()
    made.metadata = made.metadata.model_copy(update={"prompt": prompt})
    return made


def scores(model: UniMoER, prompt: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Vectors of queries and of documents, and scores of pairs, as mteb gets them."""
    about = task(prompt).metadata
    encode, asked, read = (
        Encoder(model, "a/b", "1").encode,
        [{"text": QUERIES}],
        [{"text": DOCUMENTS}],
    )
    return (
        encode(asked, task_metadata=about, prompt_type=PromptType.query, **AT),
        encode(read, task_metadata=about, prompt_type=PromptType.document, **AT),
        CrossEncoder(model, "a/b", "1").predict(asked, read, task_metadata=about, **AT),
    )


@pytest.mark.parametrize(
    ("prompt", "stands"),
    [("find", "find"), ({"query": "of q", "document": "of d"}, "of q"),
     ({"document": "of d"}, "own"), (None, "own"), ("", "own")],
)  # fmt: skip
def test_a_tasks_instruction_stands_in_its_place(model: UniMoER, prompt: Any, stands: str) -> None:
    """Else the model's own does. The template of documents has no place for one."""
    tokenizer, about = model.tokenizer.with_instruction(stands), task(prompt).metadata
    queries, documents, pairs = scores(model, prompt)
    torch.testing.assert_close(queries, model.embed_all(TextSet(tokenizer.queries(QUERIES))))
    torch.testing.assert_close(documents, model.encode_document(DOCUMENTS))
    ids = tokenizer.pairs(list(zip(QUERIES, DOCUMENTS, strict=True)))
    torch.testing.assert_close(pairs, model.score_all(TextSet(ids)))
    assert mteb_adapter.prompts_of(Encoder(model, "a/b", "1"), about) == {
        "query": f"Instruct: {stands}\nQuery:{{query}}", "document": "{document}",
    }  # fmt: skip
    assert mteb_adapter.prompts_of(CrossEncoder(model, "a/b", "1"), about) == {
        "pair": f"{stands} {{query}} {{document}}"
    }


def test_documents_have_their_own(tiny_base: Path) -> None:
    made = replace(OWN, document="{instruction}: {document}")
    model = UniMoER(ModelConfig(base=str(tiny_base), prompts=made))
    _, found, _ = scores(model, {"query": "of q", "document": "of d"})
    other = model.tokenizer.with_instruction("of d")
    torch.testing.assert_close(found, model.embed_all(TextSet(other.documents(DOCUMENTS))))
    _, found, _ = scores(model, {"query": "of q"})
    torch.testing.assert_close(found, model.encode_document(DOCUMENTS))


@pytest.mark.parametrize("head", ["linear", "interaction", "pseudo_query"])
def test_templates_without_a_place_are_unchanged(tiny_base: Path, head: str) -> None:
    model = UniMoER(ModelConfig(base=str(tiny_base), rerank_head=head))
    for found, expected in zip(scores(model, "find"), scores(model, None), strict=True):
        assert torch.equal(found, expected)
    for side in (Encoder(model, "a/b", "1"), CrossEncoder(model, "a/b", "1")):
        found = mteb_adapter.prompts_of(side, task("find").metadata)
        plain = mteb_adapter.prompts_of(side, task(None).metadata)
        assert "find" not in str(found) and found == plain
        assert ("pair" in found) == (head == "linear" and isinstance(side, CrossEncoder))


def test_other_code_is_named(model: UniMoER, tmp_path: Path, capsys) -> None:
    """Also where nothing says which made it; the result is taken as it is."""
    side, line = Encoder(model, "a/b", "1"), [task(None), tmp_path]
    place = tmp_path / "results/a__b/1/MockRetrievalTask.json"
    told = place.parent / "made_by" / place.name
    score = mteb_adapter.main_score(side, *line)
    made = json.loads(told.read_text())
    assert made["sources"] == sources() and made["device"] and made["versions"]["torch"]
    assert mteb_adapter.main_score(side, *line) == score
    assert "warning" not in capsys.readouterr().err
    before = place.read_bytes()
    for change in (lambda: told.write_text(json.dumps({**made, "sources": "0"})), told.unlink):
        change()
        assert mteb_adapter.main_score(side, *line) == score and place.read_bytes() == before
        warning = f"warning: the source has changed since {place} was made\n"
        assert capsys.readouterr().err.count(warning) == 1


def test_the_prompts_lie_beside_the_scores(model: UniMoER, tmp_path: Path) -> None:
    """A result of others, or one that says nothing where the task now has its own, is made anew."""
    side = Encoder(model, "a/b", "1")
    place = tmp_path / "results/a__b/1/MockRetrievalTask.json"
    told = place.parent / "made_by" / place.name

    def made_anew(prompt: Any) -> bool:
        before = place.stat().st_mtime_ns if place.exists() else None
        mteb_adapter.main_score(side, task(prompt), tmp_path)
        query = json.loads(told.read_text())["prompts"]["query"] if told.exists() else ""
        assert query in ("", f"Instruct: {prompt or 'own'}\nQuery:{{query}}")
        return place.stat().st_mtime_ns != before

    assert made_anew("find") and not made_anew("find")
    assert made_anew("look") and made_anew(None)
    told.unlink()
    assert not made_anew(None) and not told.exists()
    assert made_anew("find") and told.exists()

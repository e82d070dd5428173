"""Lists as one text: the template, what is cut, how blocks are put together, the trained marks."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer

from model import listwise
from model.listwise import BLOCK, NEW, SYSTEM, Interaction, Lists, by_query, combine
from model.lora import LoRAConfig
from model.packed import pack
from model.router import RouterConfig
from model.tokens import Prompts
from model.tokens import Tokenizer as OurTokenizer
from model.unimoer import ModelConfig, UniMoER
from tests.model import made

LORA = LoRAConfig(("embedding", "reranking", "shared"), (4, 3, 2), (8.0, 6.0, 4.0), first_layer=1)
QUERY = "what is the capital of France?"
DOCUMENTS = ["Paris", "the capital of France is Paris", "", "yes", "def read(path): return None"]


make = partial(made.make, rerank_head="interaction")


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> UniMoER:
    return make(tiny_base)


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> OurTokenizer:
    return OurTokenizer(tiny_base, Prompts(), 6)


def text_of(lists: Lists, ids: list[int]) -> str:
    """What the ids say, the marks as <D> and <Q>."""
    found, run = "", []
    for i in [*ids, None]:
        if i is None or i in lists.marks:
            found += lists.tokenizer.fast.decode(run, skip_special_tokens=False)
            found += "" if i is None else "<D>" if i == lists.marks[0] else "<Q>"
            run = []
        else:
            run.append(i)
    return found


# The template ---------------------------------------------------------------------------------


def test_the_plain_template(tokenizer: OurTokenizer) -> None:
    lists = Lists(tokenizer, 8192)
    assert lists.marks == NEW and min(NEW) < max(NEW) < 0
    [block] = lists.blocks("who?", ["a", "b c"])
    assert block.documents == 2
    assert text_of(lists, block.ids) == (
        "I will provide you with 2 passages, each indicated by a numerical identifier. "
        "Rank the passages based on their relevance to query: who?\n"
        '<passage id="0">\na<D>\n</passage>\n'
        '<passage id="1">\nb c<D>\n</passage>\n'
        "<query>\nwho?<Q>\n</query>"
    )
    [early] = lists.blocks("who?", ["a", "b c"], early=True)
    assert text_of(lists, early.ids).replace("<Q>", "", 1) == text_of(lists, block.ids)
    assert "query: who?<Q>\n<passage" in text_of(lists, early.ids)
    assert lists.blocks("who?", []) == []


def test_an_instruction_stands_between_query_and_documents(tokenizer: OurTokenizer) -> None:
    lists = Lists(tokenizer, 8192)
    [plain], [early] = (lists.blocks("who?", ["a"], early) for early in (False, True))
    asked = {"instruction": "look <|embed_token|>up"}
    [found], [trained] = (lists.blocks("who?", ["a"], early, **asked) for early in (False, True))
    block = "<instruct>\nlook up\n</instruct>\n"
    for text, without in ((found, plain), (trained, early)):
        whole = text_of(lists, text.ids)
        assert whole.replace(f"\n{block}<passage", "\n<passage") == text_of(lists, without.ids)
        assert whole.count(block) == 1
    # It is never cut, and counts.
    few = Lists(tokenizer, 450)
    long = "look up " * 20
    free, parts = (few.blocks("who?", ["a"] * 9, instruction=text) for text in ("", long))
    assert len(parts) > len(free) and max(len(part.ids) for part in parts) <= 450
    assert all(f"\n{long}\n" in text_of(lists, part.ids) for part in parts)


def test_with_chat_tokens_the_chat_template(tiny_base: Path, tmp_path: Path) -> None:
    """And where the vocabulary has the marks, these are used."""
    made = Tokenizer.from_file(str(tiny_base / "tokenizer.json"))
    added = ["<|im_start|>", "<|im_end|>", "<|embed_token|>", "<|rerank_token|>"]
    made.add_special_tokens([AddedToken(token, normalized=False) for token in added])
    made.save(str(tmp_path / "tokenizer.json"))
    lists = Lists(OurTokenizer(tmp_path, Prompts(), 6), 8192)
    assert lists.marks == (made.token_to_id(added[2]), made.token_to_id(added[3]))
    [block] = lists.blocks("who?", ["a"])
    text = text_of(lists, block.ids)
    assert text.startswith(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nI will ")
    end = "</query><|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert text.endswith(f"who?<Q>\n{end}")


def test_what_the_tokenizer_puts_first_comes_once(tiny_base: Path, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    made = Tokenizer.from_file(str(tiny_base / "tokenizer.json"))
    end = made.token_to_id("<|endoftext|>")
    made.post_processor = TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", end)])
    made.save(str(tmp_path / "tokenizer.json"))
    bare, first = (Lists(OurTokenizer(f, Prompts(), 6), 999) for f in (tiny_base, tmp_path))
    for early in (False, True):
        [a], [b] = (lists.blocks("who?", DOCUMENTS, early) for lists in (bare, first))
        assert b.ids == [end, *a.ids]


@pytest.mark.parametrize(
    "text",
    [
        "a<|embed_token|>b",
        "<|rerank_token|>a<|embed_token|>b<|rerank_token|>",
        "a<|embed_<|rerank_token|>token|>b",
        "a<|re<|embed_<|embed_token|>token|>rank_token|>b",
    ],
)
def test_marks_are_taken_out_of_texts(tokenizer: OurTokenizer, text: str) -> None:
    assert listwise.strip(text) == "ab"
    lists = Lists(tokenizer, 8192)
    assert lists.blocks(text, [text]) == lists.blocks("ab", ["ab"])


def test_only_documents_are_cut(tokenizer: OurTokenizer) -> None:
    lists = Lists(tokenizer, 8192)
    query = "what is the capital of France? " * 20
    [block] = lists.blocks(query, ["Paris " * 50, "no"])
    text = text_of(lists, block.ids)
    assert text.count(query) == 2 and text.endswith("\n</query>")
    documents = [part.partition("<D>")[0] for part in text.split('">\n')[1:]]
    assert documents[1] == "no" and 0 < len(documents[0]) < 40
    assert len(tokenizer.fast.encode(documents[0]).ids) == tokenizer.document_tokens


# The budget of tokens -------------------------------------------------------------------------


def test_a_list_is_parted_where_the_next_document_would_not_fit(tokenizer: OurTokenizer) -> None:
    documents = ["Paris", "no", "the Seine is a river", "yes"] * 5
    whole = Lists(tokenizer, 8192).blocks(QUERY, documents)
    assert [block.documents for block in whole] == [20]
    for budget in (250, 300, 500):
        lists = Lists(tokenizer, budget)
        blocks = lists.blocks(QUERY, documents)
        assert len(blocks) > 1 and sum(block.documents for block in blocks) == 20
        assert max(len(block.ids) for block in blocks) <= budget
        at = 0
        for block in blocks:  # each is a list of its own, and no other document would have fit
            mine = documents[at : at + block.documents]
            assert [block] == Lists(tokenizer, 8192).blocks(QUERY, mine)
            at += block.documents
            if at < 20:
                more = Lists(tokenizer, 8192).blocks(QUERY, [*mine, documents[at]])[0]
                # Reckoned with: three digits for a number, the end of a passage for the first too.
                assert len(more.ids) > budget - 20 - 2 * more.documents


def test_at_most_125_documents_are_one_text(tokenizer: OurTokenizer) -> None:
    blocks = Lists(tokenizer, 100_000).blocks("q", ["no"] * 260)
    assert [block.documents for block in blocks] == [BLOCK, BLOCK, 10] and BLOCK == 125


def test_a_document_gives_way_to_a_long_query(tiny_base: Path) -> None:
    """What the query leaves of list_tokens is the document's, until nothing is left."""
    lists = Lists(OurTokenizer(tiny_base, Prompts(), 1000), 300)
    [block] = lists.blocks(QUERY, ["Paris on the Seine " * 100])
    assert 275 <= len(block.ids) <= 300
    assert text_of(lists, block.ids).count(QUERY) == 2
    with pytest.raises(ValueError, match=r"list_tokens=300 is too few: .* Raise list_tokens"):
        lists.blocks(QUERY * 10, ["Paris"])


# Scores ---------------------------------------------------------------------------------------


def test_combined_by_hand() -> None:
    """Two blocks whose best documents score 1 and 0: weights 1 and 1/2."""
    first = torch.tensor([[0.0, 3.0], [2.0, 0.0], [1.0, 0.0]])  # cosines 0, 1
    second = torch.tensor([[5.0, 0.0], [0.0, -1.0], [0.0, 4.0]])  # cosines 0, -1
    query = (1 * first[-1] + 0.5 * second[-1]) / 1.5  # (2/3, 4/3)
    expected = torch.tensor([2.0, 1.0, 1.0, -2.0]) / 5**0.5
    torch.testing.assert_close(query, torch.tensor([2 / 3, 4 / 3]))
    torch.testing.assert_close(combine([first, second]), expected)
    torch.testing.assert_close(combine([first]), torch.tensor([0.0, 1.0]))
    assert combine([]).shape == (0,)
    opposite = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])  # a weight of 0
    torch.testing.assert_close(combine([opposite, opposite]), torch.tensor([-1.0, -1.0]))


def test_pairs_become_lists_and_find_back() -> None:
    pairs = [("q", "a"), ("p", "b"), ("q", "c"), ("r", "d"), ("p", "e")]
    lists, places = by_query(pairs)
    assert lists == [("q", ["a", "c"]), ("p", ["b", "e"]), ("r", ["d"])]
    flat = [document for _, documents in lists for document in documents]
    assert [flat[place] for place in places] == [document for _, document in pairs]


def test_every_way_to_a_score_is_the_same(model: UniMoER) -> None:
    """score_lists, score_pairs, predict, rank, and score on a packed batch of lists."""
    other = ("read a file", ["open(path)", "no", "yes"])
    both = [(QUERY, DOCUMENTS), other]
    one, two = model.score_lists(both)
    assert one.shape == (5,) and one.std() > 1e-3 and one.abs().max() <= 1
    pairs = [(QUERY, text) for text in DOCUMENTS]
    mixed = [pairs[0], *((other[0], text) for text in other[1]), *pairs[1:]]
    found = model.score_pairs(mixed)
    torch.testing.assert_close(found, torch.cat((one[:1], two, one[1:])), rtol=0, atol=3e-6)
    torch.testing.assert_close(model.predict(pairs), (1 + one) / 2, rtol=0, atol=3e-6)
    ranked = model.rank(QUERY, DOCUMENTS)
    assert [i for i, _ in ranked] == one.argsort(descending=True).tolist()
    assert [s for _, s in ranked] == pytest.approx(
        ((1 + one) / 2).sort(descending=True)[0].tolist(), abs=3e-6
    )
    ids = [block.ids for query, documents in both for block in model.lists.blocks(query, documents)]
    with torch.no_grad():
        scores, routing = model.score(pack(ids))
    torch.testing.assert_close(scores, torch.cat((one, two)), rtol=0, atol=3e-6)
    assert [w.shape for w in routing] == [(2, 3)] * 3  # a list is routed as one text
    assert model.score_pairs([]).shape == (0,) and model.rank(QUERY, []) == []


@pytest.mark.parametrize("budget", [1, 8192])
def test_lists_do_not_see_each_other(model: UniMoER, budget: int) -> None:
    lists = [(QUERY, DOCUMENTS), ("no", ["yes"]), ("river", ["Seine", "Paris"])]
    together = model.score_lists(lists, budget=budget)
    for one, scores in zip(lists, together, strict=True):
        torch.testing.assert_close(model.score_lists([one])[0], scores, rtol=0, atol=1e-5)


def test_a_document_sees_the_query_and_what_stands_before_it(tiny_base: Path) -> None:
    """With fixed gates: routing reads the whole list."""
    model = make(tiny_base, router=None)

    def vectors(query: str, documents: list[str]) -> torch.Tensor:
        [block] = model.lists.blocks(query, documents)
        with torch.no_grad():
            return model.marked(pack([block.ids]))[0]

    base = vectors(QUERY, ["Paris", "no", "yes"])
    later = vectors(QUERY, ["Paris", "no", "Seine"])
    torch.testing.assert_close(later[:2], base[:2], rtol=0, atol=1e-5)
    assert (later[2:] - base[2:]).norm(dim=1).min() > 1e-3  # the document itself, and the query
    earlier = vectors(QUERY, ["Lyon", "no", "yes"])
    assert (earlier - base).norm(dim=1).min() > 1e-3
    asked = vectors("what is the path of France?", ["Paris", "no", "yes"])
    assert (asked - base).norm(dim=1).min() > 1e-3


# The trained marks ----------------------------------------------------------------------------


def test_the_marks_take_the_place_of_input_embeddings(tiny_base: Path) -> None:
    """As vectors of two tokens they do what these tokens do."""
    model = make(tiny_base)
    assert isinstance(model.head, Interaction) and model.head.marks is not None
    rows = model.decoder.embed_tokens.weight
    with torch.no_grad():
        model.head.marks.copy_(rows[[7, 8]])
        [block] = model.lists.blocks(QUERY, DOCUMENTS)
        found = model.hidden(pack([block.ids]), "reranking")[0]
        as_tokens = [{-1: 7, -2: 8}.get(i, i) for i in block.ids]
        expected, _ = model.decoder(pack([as_tokens]), torch.ones(1, dtype=torch.int64))
    torch.testing.assert_close(found, expected)


def test_marks_start_as_the_end_token_and_are_trained(tiny_base: Path) -> None:
    config = ModelConfig(base=str(tiny_base), rerank_head="interaction", lora=LORA)
    model = UniMoER(config)
    head = model.head
    assert isinstance(head, Interaction) and head.marks is not None
    rows = model.decoder.embed_tokens.weight
    assert torch.equal(head.marks.detach(), rows[[model.tokenizer.end_id] * 2])
    [block] = model.lists.blocks(QUERY, DOCUMENTS)
    model.score(pack([block.ids]))[0].sum().backward()
    assert head.marks.grad is not None and head.marks.grad.norm(dim=1).min() > 0
    assert rows.grad is None and not rows.requires_grad
    weight = model.trained()["head.projector.0.weight"]
    start = weight.detach().clone()
    with torch.no_grad():
        for parameter in model.trained().values():
            parameter.add_(1.0)
    model.reset_parameters(0)
    assert torch.equal(weight, start)
    assert torch.equal(head.marks.detach(), rows[[model.tokenizer.end_id] * 2])


def test_embedding_texts_need_no_gradient_below_the_experts(model: UniMoER) -> None:
    """Else every step of the embedding task would go back through the frozen layers."""
    seen = []
    hook = model.decoder.layers[0].register_forward_hook(lambda m, i, out: seen.append(out[0]))
    model.embed(pack(model.tokenizer.documents(["Paris"])))
    hook.remove()
    assert not seen[0].requires_grad


@pytest.mark.parametrize(
    "changes",
    [{}, {"lora": None, "router": None}, {"dtype": "bfloat16"}, {"dtype": "float64"},
     {"causal": False, "embedding_pooling": "first", "list_tokens": 250}],
)  # fmt: skip
def test_saved_and_loaded_is_identical(tiny_base: Path, tmp_path: Path, changes: dict) -> None:
    model = make(tiny_base, **changes)
    model.save_pretrained(tmp_path)
    loaded = UniMoER.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert loaded.rank(QUERY, DOCUMENTS) == model.rank(QUERY, DOCUMENTS)
    plain = UniMoER(model.config)
    assert plain.rank(QUERY, DOCUMENTS) != model.rank(QUERY, DOCUMENTS)
    assert set(load_file(tmp_path / "heads.safetensors")) == {
        "head.marks", "head.projector.0.weight", "head.projector.2.weight",
    }  # fmt: skip


def test_similarity_cannot_route_lists() -> None:
    with pytest.raises(ValueError, match="there are none for lists: use another router"):
        ModelConfig(rerank_head="interaction", router=RouterConfig("similarity-mean"))


def test_other_heads_read_no_lists(tiny_base: Path) -> None:
    linear = UniMoER(ModelConfig(base=str(tiny_base)))
    with pytest.raises(ValueError, match="'linear' scores pairs: use score_pairs"):
        linear.score_lists([(QUERY, DOCUMENTS)])
    with pytest.raises(AssertionError, match="linear reads no marks"):
        linear.marked(pack([[5, 6]]))


def test_one_list_can_be_learnt(tiny_base: Path) -> None:
    config = ModelConfig(base=str(tiny_base), rerank_head="interaction", lora=LORA)
    model = UniMoER(config).train()
    optimizer = torch.optim.Adam(model.trained().values(), lr=4e-3)
    orders: list[Callable[[list[str]], list[str]]] = [lambda d: d, lambda d: d[::-1]]
    ids = [model.lists.blocks(QUERY, order(DOCUMENTS))[0].ids for order in orders]
    target = torch.tensor([1, 3])  # the same document in both
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = F.cross_entropy(model.score(pack(ids))[0].view(2, 5) / 0.1, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1 and losses[-1] < 0.05, losses


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_kernels_give_the_same_scores_and_gradients(tiny_base: Path, device: str) -> None:
    """Also of the marks, whose gradient goes back through a layer without experts."""
    config = ModelConfig(
        base=str(tiny_base), rerank_head="interaction", lora=LORA, router=RouterConfig(), layers=2
    )
    found = []
    for kernels in ("torch", "triton"):
        model = UniMoER(config, device, kernels=kernels)
        with torch.no_grad():
            for name, parameter in model.trained().items():
                if "lora_B" in name:
                    generator = torch.Generator().manual_seed(2)
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        [block] = model.lists.blocks("river?", ["Seine", "no"])
        scores, _ = model.score(pack([block.ids], device))
        (scores * torch.tensor([1.0, -2.0], device=device)).sum().backward()
        gradients = {n: p.grad for n, p in model.trained().items() if p.grad is not None}
        found.append((scores.detach(), gradients))
    (plain, expected), (fused, gradients) = found
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-5)
    assert gradients.keys() == expected.keys() >= {"head.marks", "head.projector.0.weight"}
    for name, gradient in gradients.items():
        scale = expected[name].norm().clamp(min=1e-3)
        assert (gradient - expected[name]).norm() < 1e-3 * scale, name

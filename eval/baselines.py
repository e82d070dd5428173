"""The baselines: BM25, and published models as configurations of our own.

Each model is the published checkpoint with its published prompts, read by the same code as ours
(`lora=None`: the bare base). Two rules of ours stay: a document loses its end and never the query
or the template, and special tokens that a text spells are characters.

- Qwen3-Embedding and Qwen3-Reranker (arXiv 2506.05176): two models. The embedder is read at the
  end token; the reranker's score is log p("yes") - log p("no") behind the template's last word.
- E2Rank (arXiv 2510.22733): one embedder, which reranks with a pseudo-query, in the words of its
  published evaluation but for its cut (1,024 words of a document there, tokens here); see
  `model.pseudo`.
- jina-reranker-v3 (arXiv 2509.25085): one listwise reranker; see `eval.jina`.

What has to be trained (one LoRA for both tasks, jina-embeddings-v3's switch by task,
RouterRetriever's by similarity, a reranking LoRA on a frozen embedder) is `trained_baselines` in
experiments.py; such a saved model is a row too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from eval import jina
from model import bases, saved, weights
from model.commits import COMMITS
from model.listwise import CHAT
from model.pseudo import PseudoQuery
from model.tokens import Prompts
from model.unimoer import ModelConfig, UniMoER

BM25 = "bm25"
SIZES = ("0.6B", "4B", "8B")
TASK = "Given a web search query, retrieve relevant passages that answer the query"
JUDGE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n"
)
EMBEDDING = "Qwen/Qwen3-Embedding-{size}"
RERANKER = "Qwen/Qwen3-Reranker-{size}"
TOKENS = 8192  # of a text, in the published examples of Qwen3
E2RANK_TOKENS = 1024  # of a document, in E2Rank's training

Source = ModelConfig | Path  # a published model, or a folder written by save_pretrained


@dataclass(frozen=True)
class Row:
    """A line of the table.

    name: as results are filed. what: for the reader.
    embedder: retrieves. reranker: scores candidates; where both are equal it is one model. None:
    the row has nothing for this task.
    pseudo_query: the reranker scores with it, not with its head.
    untrained: of its one saved model nothing but the bare base is run.
    trains: the base that it is trained on first; then it is the row of a saved model (`ours`).
    """

    name: str
    what: str
    embedder: Source | None = None
    reranker: Source | None = None
    pseudo_query: PseudoQuery | None = None
    untrained: bool = False
    trains: str = ""

    def sources(self) -> list[Source]:
        """Its models, each once."""
        return [s for s in dict.fromkeys((self.embedder, self.reranker)) if s is not None]


def embedder(base: str, task: str = TASK, document_tokens: int = TOKENS) -> ModelConfig:
    """Qwen3-Embedding and what is made like it. base: hub id or folder."""
    prompts = Prompts(query="Instruct: {instruction}\nQuery:{query}", instruction=task)
    return ModelConfig(
        base=base, prompts=prompts,
        embedding_pooling="last", end_token="<|endoftext|>", document_tokens=document_tokens,
    )  # fmt: skip


def reranker(base: str, task: str = TASK) -> ModelConfig:
    """Qwen3-Reranker. base: hub id or folder."""
    body = "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
    prompts = Prompts(pair=JUDGE + body + CHAT[1], instruction=task)
    return ModelConfig(
        base=base, prompts=prompts, rerank_head="yes_no",
        reranking_pooling="last", end_token="<|endoftext|>", document_tokens=TOKENS,
    )  # fmt: skip


def published(task: str = TASK) -> list[Row]:
    """Every row of a published model, and of what is trained on one. task: the instruction of the
    Qwen3 prompts.

    Raises:
        ValueError: the task holds a place such as {query}.
    """
    rows = [Row(BM25, "terms in common")]
    for size in SIZES:
        models = (
            embedder(EMBEDDING.format(size=size), task),
            reranker(RERANKER.format(size=size), task),
        )
        rows.append(Row(f"qwen3-{size.lower()}", "Qwen3-Embedding + Qwen3-Reranker", *models))
    for size in SIZES:
        base, what = EMBEDDING.format(size=size), "Qwen3-Embedding + reranking LoRA"
        rows.append(Row(f"qwen3-{size.lower()}-lora", what, trains=base))
    for size in SIZES:
        both = embedder(f"Alibaba-NLP/E2Rank-{size}", task, E2RANK_TOKENS)
        asked = PseudoQuery(chat=True, asks="Search Query: ")
        rows.append(Row(f"e2rank-{size.lower()}", "E2Rank: pseudo-query", both, both, asked))
    listwise = ModelConfig(
        base=jina.JINA, rerank_head="interaction", document_tokens=jina.DOCUMENT_TOKENS,
        list_tokens=jina.LIST_TOKENS,
    )  # fmt: skip
    rows.append(Row("jina-reranker-v3", "whole lists, cosines", reranker=listwise))
    return rows


def ours(folder: Path, asked: PseudoQuery | None = None) -> Row:
    """The row of a saved model: one for both tasks.

    Args:
        asked: its embedder reranks with this, in place of its head.
    Raises:
        ValueError: the folder is none of `save_pretrained`.
    """
    config, _ = saved.read_config(folder)
    if config.router is None:
        what = "one LoRA" if config.lora else "bare base"
    else:
        kind = config.router.kind
        known = {"task": "LoRAs switched by task (jina-embeddings-v3)"}
        known |= dict.fromkeys(("similarity-mean", "similarity-max"),
                               "LoRAs switched by similarity (RouterRetriever)")  # fmt: skip
        what = known.get(kind, f"LoRAs weighed by {kind}")
    if embeds_as_base(folder):
        what = f"reranking LoRA beside {Path(config.base).name}"
    name, place = saved.name_of(folder), Path(folder)
    if config.rerank_head == "pseudo_query":
        what = f"{what}, pseudo-query"
    elif asked:
        name, what = f"{name}-pseudo-query", f"{what}, pseudo-query"
    return Row(name, what, place, place, asked)


def embeds_as_base(folder: Path) -> bool:
    """Whether a saved model has an expert for reranking alone: its router goes by the task, and
    the other expert adds nothing."""
    config, _ = saved.read_config(folder)
    if config.router is None or config.router.kind != "task" or config.router.always_on:
        return False
    assert config.lora is not None
    mine = config.lora.slices()["embedding"]
    tensors = saved.read_tensors(folder)
    return not any(t[:, mine].any() for name, t in tensors.items() if ".lora_B." in name)


def bare(folders: Sequence[Path]) -> list[Row]:
    """The untrained bases of saved models, read as these read them (layers, pooling, prompts, the
    end of a pair); one row for all models that have it in common, named after the first of them.

    Raises:
        ValueError: a folder is none of `save_pretrained`.
    """
    rows: dict[tuple[ModelConfig, bool], Row] = {}
    for folder in folders:
        config, _ = saved.read_config(folder)
        plain = replace(
            config, lora=None, router=None, rerank_head="linear", list_tokens=0, checkpointing=False
        )
        name, place = f"{saved.name_of(folder)}-untrained", Path(folder)
        what = f"untrained {Path(config.base).name}, 20 random heads"
        ends = config.rerank_head != "yes_no"  # whether a pair is read with the end token
        rows.setdefault((plain, ends), Row(name, what, place, place, untrained=True))
    return list(rows.values())


def at_hand(name: str) -> Path | None:
    """The folder of a published model that needs no fetching: `name` itself, or whole in the hub's
    cache."""
    if Path(name).is_dir():
        return Path(name)
    try:
        found = snapshot_download(
            name, revision=COMMITS.get(name), allow_patterns=bases.HUB_FILES, local_files_only=True
        )
        weights.checkpoint(Path(found))  # all of its files
    except (LocalEntryNotFoundError, ValueError):
        return None
    return Path(found)


def load(source: Source, device: torch.device | str) -> UniMoER:
    """A row's model. Raises ValueError if it cannot be had, or is another one."""
    if isinstance(source, Path):
        return UniMoER.from_pretrained(source, device)
    if source.rerank_head == "interaction":
        return jina.load(source.base, device, source.dtype, document_tokens=source.document_tokens)
    return UniMoER(source, device)


def adapt(row: Row, dtype: str, document_tokens: int) -> Row:
    """A published row with its models in this dtype, and documents cut at so many tokens where that
    is earlier than its authors cut them (0: where they do)."""

    def adapted(source: Source | None) -> Source | None:
        if not isinstance(source, ModelConfig):
            return source
        most = min(document_tokens or source.document_tokens, source.document_tokens)
        return replace(source, dtype=dtype, document_tokens=most)

    return replace(row, embedder=adapted(row.embedder), reranker=adapted(row.reranker))


def parameters(model: UniMoER, head: bool, base: bool = False) -> int:
    """How many numbers have to be in memory: base, experts, routers and, if it is used, head; base:
    of the base alone."""
    tensors = [*model.decoder.named_weights().values()]
    if not base:
        tensors += [p for name, p in model.kept().items() if head or not name.startswith("head.")]
        tensors += model.head.buffers() if head else []
    return sum(t.numel() for t in tensors)

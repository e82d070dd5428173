"""jina-reranker-v3 (arXiv 2509.25085) as a baseline: the published checkpoint as one of our models.

`python -m eval.jina --out FOLDER` writes a folder that `make eval` and `make rag` take as MODEL=.
It holds the projector and names the base, which is Qwen3-0.6B with all of its weights trained.
Scores are those of the published `rerank`, but for two rules of ours: a query is never cut, and the
tokens of the template count when a list is parted (its own part lists of over 131,072 tokens a
little earlier). It was not trained to embed: what `make eval` says of its retrieval means nothing.
The weights are CC BY-NC 4.0.
"""

import argparse
import sys

import torch

from eval.command import exit_status
from model import bases
from model.listwise import Interaction
from model.unimoer import ModelConfig, UniMoER

JINA = "jinaai/jina-reranker-v3"
MARKS = (151670, 151671)  # <|embed_token|>, <|rerank_token|>
DOCUMENT_TOKENS, LIST_TOKENS = 2048, 131072


def load(
    base: str = JINA,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    marks: tuple[int, int] = MARKS,
    document_tokens: int = DOCUMENT_TOKENS,
) -> UniMoER:
    """The reranker, for `rank`, `predict` and `score_lists`.

    Args:
        base: the hub id, or a folder with its files. marks: the ids at which it is read.
        document_tokens: where a document is cut; 2,048, as published.
    Raises:
        ValueError: it cannot be had, or is another model.
    """
    try:
        folder = bases.resolve(base)
    except ValueError as problem:
        raise ValueError(f"this baseline needs {JINA}: {problem}") from problem
    config = ModelConfig(
        base=str(base), rerank_head="interaction", dtype=dtype,
        document_tokens=document_tokens, list_tokens=LIST_TOKENS,
    )  # fmt: skip
    model = UniMoER(config, device)
    assert isinstance(model.head, Interaction)
    if model.lists.marks != marks or not model.head.own:
        raise ValueError(
            f"{folder} is no {JINA}: expected projector.0.weight and projector.2.weight in its "
            f"weights and the marks at {marks} in its tokenizer.json, found them at "
            f"{model.lists.marks} and {'a' if model.head.own else 'no'} projector"
        )
    return model


def main(arguments: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(prog="python -m eval.jina", description=__doc__)
    made.add_argument("--base", default=JINA, help="the hub id, or a folder with its files")
    made.add_argument("--dtype", default="bfloat16", help="of the base; bfloat16, as published")
    made.add_argument("--out", required=True, help="the folder to write")
    args = made.parse_args(arguments)

    def work() -> None:
        load(args.base, dtype=args.dtype).save_pretrained(args.out)
        print(args.out)

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())

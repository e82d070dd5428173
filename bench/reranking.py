"""Reranking pairs of natural, mixed length: ours, packed, against sentence-transformers, padded.

Both run the same weights, last-token pooling and the same linear head on the same tokens. Tokens
and scores are compared before anything is timed. The rival, a CrossEncoder put together of its
library's own modules, stands at its best batch size, which two rounds at each of them find first.
"""

import tempfile
from functools import partial
from pathlib import Path

import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor

from bench import timing
from bench.encoding import cut_base
from eval.collections import Collection, require_split
from model import bases
from model.heads import LinearScore
from model.packed import pack, pack_trie
from model.prefix import TextSet
from model.texts import usual_budget
from model.unimoer import ModelConfig, UniMoER
from train.trial import Workbench

BATCHES = {"cpu": (1, 2, 4, 8, 16, 32, 40), "cuda": (16, 32, 64, 128, 256)}
CANDIDATES = 10  # of BM25's for each query
SEAM = "Document:"  # the pair's template is cut behind it: what is before is the rival's first text

Pair = tuple[str, str]


def config(base: str, layers: int, dtype: str, tokens: int) -> ModelConfig:
    """The bare base with last-token pooling; documents of at most `tokens` tokens are not cut."""
    return ModelConfig(base=base, layers=layers, dtype=dtype, document_tokens=tokens)


def halves(pair: Pair, model: UniMoER) -> Pair:
    """The filled template with its end token as the two texts that a CrossEncoder takes."""
    query, document = pair
    left, right = model.tokenizer.prompts.filled("pair").split(SEAM)
    end = model.tokenizer.end_token
    return left.replace("{query}", query) + SEAM, right.replace("{document}", document) + end


def mixed_pairs(collection: Collection, model: UniMoER, count: int, tokens: int) -> list[Pair]:
    """`count` pairs of at most `tokens` tokens: test queries, spread evenly, each with BM25's best.

    Longer ones are left out, not cut: cut pairs are all equally long, which no natural mix is. So
    are pairs whose tokens change where the rival cuts the text.

    Raises:
        ValueError: fewer than two pairs are left.
    """
    queries = list(require_split(collection, "test"))
    asked = queries[:: max(1, len(queries) * CANDIDATES // (2 * count))]
    best = collection.bm25("test").search({q: collection.queries[q] for q in asked}, CANDIDATES)
    pairs = [(collection.queries[q], collection.corpus[d]) for q in asked for d in best[q]]
    kept: dict[str, list[Pair]] = {}
    for pair, ids in zip(pairs, model.tokenizer.pairs(pairs), strict=True):
        apart = [model.tokenizer.template(text) for text in halves(pair, model)]
        if len(ids) <= tokens and ids == apart[0] + apart[1]:
            kept.setdefault(pair[0], []).append(pair)
    found = sum(map(len, kept.values()))
    if found < 2:
        raise ValueError(
            f"{collection.name}: of {len(pairs)} pairs {found} have at most {tokens} tokens, "
            "the same ones in two texts; expected 2 or more: take other DATA, or a base whose "
            "tokenizer puts nothing before a text"
        )
    # The candidates of a query together, as they are in use; of the queries first every second one,
    # since there are twice as many as are needed if nothing is too long.
    groups = list(kept.values())
    return [pair for group in groups[::2] + groups[1::2] for pair in group][:count]


def cross_encoder(model: UniMoER, folder: Path, layers: int, tokens: int) -> CrossEncoder:
    """The library's model of the same weights: transformer, last token, linear to a score."""
    dtype, width = model.dtype, model.decoder.config.hidden_size
    assert isinstance(model.head, LinearScore)
    with tempfile.TemporaryDirectory() as place:
        transformer = Transformer(
            str(cut_base(folder, layers, Path(place))),
            model_kwargs={"dtype": dtype, "attn_implementation": "sdpa"},
            max_seq_length=8 * tokens,
        )
    linear = model.head.linear
    score = Dense(
        width, 1, activation_function=None, module_output_name="scores",
        init_weight=linear.weight.detach().clone(), init_bias=linear.bias.detach().clone(),
    )  # fmt: skip
    modules = [transformer, Pooling(width, "lasttoken"), score.to(dtype)]
    return CrossEncoder(modules=modules, device=str(model.device))


def run(
    bench: Workbench,
    base: str,
    layers: int = 8,
    count: int = 40,
    tokens: int = 256,
    rounds: int = 5,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
) -> list[dict]:
    """One row for each dtype: tokens/s of both, the rival at its best batch size, and the ratio.

    Raises:
        ValueError: tokens or scores of the two differ, so they would not do the same work.
    """
    folder, rows = bases.resolve(base), []
    batches = BATCHES[torch.device(bench.device).type]
    for dtype in dtypes:
        model = UniMoER(config(base, layers, dtype, tokens), bench.device)
        pairs = mixed_pairs(bench.collection, model, count, tokens)
        rival = cross_encoder(model, folder, layers, tokens)
        texts = [halves(pair, model) for pair in pairs]
        ids = model.tokenizer.pairs(pairs)
        _check_tokens(ids, rival, texts)
        _check(model, ids, rival, texts, dtype)

        def mine(turn: int, model=model, pairs=pairs) -> Tensor:
            return model.predict(pairs)

        def theirs(turn: int, batch: int, rival=rival, texts=texts) -> Tensor:
            scores = rival.predict(texts, batch_size=batch, show_progress_bar=False)
            return torch.as_tensor(scores)

        work, queries = sum(map(len, ids)), len({query for query, _ in pairs})
        parts, trie = TextSet(ids).batches(usual_budget(model.device, 2048), 1.0)
        made = pack_trie if trie else pack
        entering = sum(len(made([ids[i] for i in part]).input_ids) for part in parts)
        best, searched = timing.best(partial(theirs, 0), batches, work)
        times = timing.seconds({"ours": mine, "theirs": partial(theirs, batch=best)}, rounds)
        rows.append(
            {
                "what": f"rerank {len(pairs)} mixed pairs of {queries} queries, {layers} layers "
                f"({entering / work:.0%} of the tokens are run)",
                "dtype": dtype,
                "against": f"sentence-transformers' CrossEncoder, batch {best}",
                "unit": "tokens/s",
                "tokens": work,
                "pairs": len(pairs),
                "entering": entering,  # of these tokens: what begins alike is run once
                **timing.against(times, [work] * rounds),
                **searched,
            }
        )
    return rows


def _check_tokens(ids: list[list[int]], rival: CrossEncoder, texts: list[Pair]) -> None:
    """The same ids, one pair at a time, so that nothing is padded."""
    for own, pair in zip(ids, texts, strict=True):
        theirs = rival.preprocess([pair])["input_ids"].flatten().tolist()
        if own != theirs:
            raise ValueError(f"the two rerankers read other tokens in {pair}: {own} and {theirs}")


def _check(
    model: UniMoER, ids: list[list[int]], rival: CrossEncoder, texts: list[Pair], dtype: str
) -> None:
    """The same logits, to the precision of the dtype, in units of their spread over the pairs."""
    ours = model.score_all(TextSet(ids))
    theirs = rival.predict(texts, activation_fn=torch.nn.Identity(), convert_to_tensor=True)
    off = ((ours - theirs.float().cpu()).abs().max() / ours.std()).item()
    if not off < (1e-3 if dtype == "float32" else 0.5):
        raise ValueError(
            f"the two rerankers disagree: scores differ by up to {off:.4f} of their standard "
            f"deviation in {dtype}"
        )

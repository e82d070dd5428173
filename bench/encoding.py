"""Encoding texts of natural, mixed length: ours, packed, against sentence-transformers, padded.

Both run the same weights on the same tokens, which is checked on the vectors before anything is
timed. The rival stands at its best batch size, which two rounds at each of them find first.
"""

import json
import os
import tempfile
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from bench import timing
from eval.collections import Collection
from model import bases
from model.config import DTYPES, ModelConfig
from model.unimoer import UniMoER
from train.trial import Workbench

BATCHES = {"cpu": (2, 4, 8, 16, 32), "cuda": (16, 32, 64, 128, 256)}
POOLINGS: dict[str, Any] = {"mean": "mean", "last": "lasttoken"}  # ours: what the rival calls it


def cut_base(folder: Path, layers: int, place: Path) -> Path:
    """A folder with the base's first layers, as transformers reads it; the weights are linked."""
    for file in folder.iterdir():
        os.symlink(file, place / file.name)
    config = json.loads((folder / "config.json").read_text())
    (place / "config.json").unlink()
    (place / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    return place


def config(base: str, layers: int, dtype: str, tokens: int, pooling: str = "mean") -> ModelConfig:
    """The bare base; texts of at most `tokens` tokens are not cut."""
    return ModelConfig(
        base=base,
        layers=layers,
        dtype=dtype,
        embedding_pooling=pooling,
        document_tokens=tokens,
    )


def mixed_texts(collection: Collection, model: UniMoER, count: int, tokens: int) -> list[str]:
    """`count` documents and half as many queries of at most `tokens` tokens, spread evenly.

    Longer ones are left out, not cut: cut texts are all equally long, which no natural mix is.
    """
    found = []
    for texts, wanted in ((collection.corpus, count), (collection.queries, count // 2)):
        lengths = model.tokenizer.fast.encode_batch(list(texts.values()))
        short = [text for text, ids in zip(texts.values(), lengths, strict=True)
                 if 0 < len(ids) <= tokens]  # fmt: skip
        found += short[:: max(1, len(short) // wanted)][:wanted]
    return found


def run(
    bench: Workbench,
    base: str,
    layers: int = 8,
    count: int = 120,
    tokens: int = 256,
    rounds: int = 5,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    poolings: tuple[str, ...] = tuple(POOLINGS),
) -> list[dict]:
    """One row for each dtype and pooling: tokens/s of both, the rival at its best batch size, and
    the ratio.

    Raises:
        ValueError: the vectors of the two differ, so they would not do the same work.
    """
    folder, rows, best = bases.resolve(base), [], {}
    batches = BATCHES[torch.device(bench.device).type]
    for pooling, dtype in product(poolings, dtypes):
        model = UniMoER(config(base, layers, dtype, tokens, pooling), bench.device)
        texts = mixed_texts(bench.collection, model, count, tokens)
        # The rival gets the end token as text, so that both run the same ids.
        ended = [text + model.tokenizer.end_token for text in texts]
        work = sum(map(len, model.tokenizer.documents(texts)))
        with tempfile.TemporaryDirectory() as place:
            options = {"dtype": DTYPES[dtype], "attn_implementation": "sdpa"}
            layer = Transformer(
                str(cut_base(folder, layers, Path(place))),
                model_kwargs=options,
                max_seq_length=8 * tokens,
            )
        pooled = Pooling(model.decoder.config.hidden_size, POOLINGS[pooling])
        rival = SentenceTransformer(modules=[layer, pooled, Normalize()], device=bench.device)

        def mine(turn: int, model=model, texts=texts) -> torch.Tensor:
            return model.encode_document(texts)

        def theirs(turn: int, batch: int, rival=rival, ended=ended) -> torch.Tensor:
            return torch.as_tensor(rival.encode(ended, batch_size=batch, show_progress_bar=False))

        _check(mine(0), theirs(0, batches[0]), dtype)
        searched = {}  # its best batch is a matter of the transformer, not of the pooling
        if dtype not in best:
            best[dtype], searched = timing.best(partial(theirs, 0), batches, work)
        times = timing.seconds({"ours": mine, "theirs": partial(theirs, batch=best[dtype])}, rounds)
        rows.append(
            {
                "what": f"encode {len(texts)} mixed texts, {layers} layers, {pooling} pooling",
                "dtype": dtype,
                "against": f"sentence-transformers, batch {best[dtype]}",
                "unit": "tokens/s",
                "tokens": work,
                **timing.against(times, [work] * rounds),
                **searched,
            }
        )
    return rows


def _check(ours: torch.Tensor, theirs: torch.Tensor, dtype: str) -> None:
    """The same vectors, to the precision of the dtype."""
    cosine = (ours.float() * theirs.float().cpu()).sum(1).min().item()
    if cosine < (1 - 1e-5 if dtype == "float32" else 1 - 2e-2):
        raise ValueError(f"the two encoders disagree: smallest cosine {cosine:.6f} in {dtype}")

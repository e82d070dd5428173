"""A collection, a configuration and a model small enough to train in a second."""

import json
import random
from dataclasses import replace
from pathlib import Path

import torch

import experiments
from eval.collections import Collection, load
from experiments import Config
from model.prefix import TextSet, TokenIds
from model.unimoer import UniMoER
from train.batches import TrainingData
from train.trial import model_config

SYLLABLES = ("ba", "ko", "mi", "tu", "re", "sol")
WORDS = [first + second for first in SYLLABLES for second in SYLLABLES]
TRAIN, DEV, TEST, DOCUMENTS = 24, 4, 10, 40
# Three experts and everything that is random in training.
NOISY_MOE = {
    **experiments.SPARSEGEN,
    "ranks": (4, 4, 4),
    "router_noise": 0.5,
    "expert_dropout": 0.2,
    "lora_dropout": 0.1,
}


def write_collection(folder: Path) -> Path:
    """A BEIR folder: query i asks for document i by one rare word and two common ones.

    Beside that, on purpose: training queries 0 and 1 share a document; query 2 has two, of which
    the better comes second; d4 and copy4 have the same text, and only d4 is judged, for query 4;
    the words of the last test query are in no document.
    """
    rng = random.Random(0)
    corpus = {
        f"d{i}": " ".join([f"rare{i}", *rng.choices(WORDS, k=4), f"odd{i}"])
        for i in range(DOCUMENTS)
    }
    corpus["copy4"] = corpus["d4"]
    corpus["empty"] = ""
    queries, judged = {}, {}
    for i in range(TRAIN + DEV + TEST):
        words = corpus[f"d{i}"].split()
        queries[f"q{i}"] = " ".join([words[0], *rng.sample(words[1:5], 2)])
        judged[f"q{i}"] = {f"d{i}": 1}
    judged["q1"] = {"d0": 1}
    judged["q2"] = {"d1": 1, "d2": 2}
    queries[f"q{TRAIN + DEV + TEST - 1}"] = "nowhere unseen"
    names = list(queries)
    splits = {"train": names[:TRAIN], "dev": names[TRAIN:-TEST], "test": names[-TEST:]}
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", corpus), ("queries", queries)):
        lines = [json.dumps({"_id": key, "text": text}) for key, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    for split, members in splits.items():
        rows = [f"{q}\t{d}\t{grade}" for q in members for d, grade in judged[q].items()]
        text = "\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n"
        (folder / "qrels" / f"{split}.tsv").write_text(text)
    return folder


def tiny_config(base: Path, data: Path, **changes: object) -> Config:
    """One LoRA of rank 4 in the upper two of four layers; `changes` win."""
    config = Config(
        base=str(base),
        data=str(data),
        adapter_layers=2,
        prefix=False,
        dtype="float32",
        embedding_pooling="mean",
        reranking_pooling="mean",
        ranks=(4,),
        document_tokens=24,
        steps=8,
        embedding_batch=6,
        reranking_batch=3,
        group_size=3,
        negatives_depth=8,
        learning_rate=5e-3,
        checkpoint_every=3,
        retrieval_depth=20,
        candidates=6,
    )
    return replace(config, **changes)  # pyright: ignore[reportArgumentType]


def tokens_only(ids: TokenIds, title: str) -> TextSet:
    """Texts without prefix states."""
    return TextSet(ids)


def build(
    config: Config,
    collection: Collection | None = None,
    device: str = "cpu",
    kernels: str = "auto",
) -> tuple[UniMoER, TrainingData]:
    """A new model and its training data."""
    seed = config.seed + config.seed_offset
    model = UniMoER(model_config(config), device, seed, kernels)
    collection = collection or load(config.data)
    return model, TrainingData(collection, model.tokenizer, config, tokens_only)


def moved(config: Config) -> UniMoER:
    """A model as after training: its experts do something."""
    model = UniMoER(model_config(config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.trained().items():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=generator)
    return model

"""trials.py: what --set takes, configs that cannot work, the name of a setting."""

import math
import re

import pytest

from trials import Config, override, setting_name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps=3", ("steps", 3)),
        ("layers=null", ("layers", None)),
        ("learning_rate=1e-3", ("learning_rate", 1e-3)),
        ("learning_rate=1", ("learning_rate", 1)),
        ("prefix=false", ("prefix", False)),
        ("router=sparsegen", ("router", "sparsegen")),
        ('tasks=["embedding"]', ("tasks", ("embedding",))),
        ("query_prompt=a=b {query}", ("query_prompt", "a=b {query}")),
        ("revision=1234567", ("revision", "1234567")),
    ],
)
def test_what_set_takes(text, expected):
    assert override(text) == expected


@pytest.mark.parametrize("text", ['ranks=["a"]', "ranks=[1.5]", "tasks=[1]", 'steps="x"', "no=1",
                                  "steps=true", "clip=true"])  # fmt: skip
def test_what_set_does_not_take(text):
    with pytest.raises(ValueError, match=f"--set '{re.escape(text)}': expected"):
        override(text)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"clip": 0}, "clip must be > 0 and finite, got 0"),
        ({"clip": -1}, "clip must be > 0 and finite, got -1"),
        ({"temperature": -0.02}, "temperature must be > 0 and finite, got -0.02"),
        ({"learning_rate": math.nan}, "learning_rate must be >= 0 and finite, got nan"),
        ({"embedding_weight": -1}, "embedding_weight must be >= 0 and finite, got -1"),
        ({"warmup": 2}, "warmup is a share of the steps, 0 to 1, got 2"),
        ({"merge_density": 7}, "merge_density is a share, above 0 to 1, got 7"),
        ({"balance": "maen"}, "balance is mean, argmax or support, got 'maen'"),
        ({"tasks": ("embedding", "embedding")}, "tasks must be some of embedding, reranking"),
        ({"tasks": ("embedding",), "probes": 1}, "leave out the arms that train"),
    ],
)
def test_a_config_that_cannot_work(fields, said):
    """Before anything is computed, and not as a result in which nothing moved."""
    with pytest.raises(ValueError, match=re.escape(said)):
        Config(**fields)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (("small", "smollm2-135m", "stdlib"), "small"),
        (("small", "smollm2-135m", "scifact"), "small-scifact"),
        (("full", "Qwen/Qwen3-0.6B-Base", "msmarco"), "full-qwen3-0.6b-base-msmarco"),
        (("smoke", "/models/Mine/", "../data/FiQA/"), "smoke-mine-fiqa"),
        (("full", "Qwen/Qwen3-0.6B-Base", "stdlib"), "full-qwen3-0.6b-base"),
        (("small", "smollm2-135m", "../data/FiQA+msmarco"), "small-fiqa+msmarco"),
        (("small", "smollm2-135m", "mteb/SciFact"), "small-mteb-scifact"),
        (("small", "smollm2-135m", "scifact+mteb/M:sw"), "small-scifact+mteb-m-sw"),
    ],
)
def test_the_name_of_a_setting(given, name):
    assert setting_name(*given) == name

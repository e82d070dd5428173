"""The sizes and rates in which every experiment of the study can be run, and what was tried for
them. Standard library only."""

SCALES = {
    # A look at the machinery: too small to conclude anything.
    "smoke": {
        "layers": 2, "adapter_layers": 1, "embedding_pooling": "mean", "reranking_pooling": "mean",
        "document_tokens": 16, "steps": 4, "train_queries": 64, "embedding_batch": 8,
        "reranking_batch": 4, "group_size": 4, "negatives_depth": 20, "learning_rate": 1e-3,
        "checkpoint_every": 2, "candidates": 5, "reranking_queries": 40, "measured": 16,
    },
    # Two CPU cores, half an hour: docs/pilot.md tells what was tried.
    "small": {
        "layers": 16, "adapter_layers": 12, "embedding_pooling": "mean",
        "reranking_pooling": "mean", "document_tokens": 64, "steps": 80, "train_queries": 1280,
        "embedding_batch": 16, "reranking_batch": 8, "group_size": 4, "negatives_depth": 20,
        "learning_rate": 3e-3, "checkpoint_every": 20, "candidates": 10, "reranking_queries": 480,
        "measured": 200,
    },
    # One GPU: every layer, longer texts, more steps.
    "full": {
        "prefix": False, "embedding_pooling": "mean",
        "reranking_pooling": "mean", "document_tokens": 256, "steps": 300, "embedding_batch": 64,
        "reranking_batch": 16, "group_size": 8, "learning_rate": 5e-4, "checkpoint_every": 100,
        "candidates": 50,
    },
}  # fmt: skip

# (learning rate, clip) that `make sweep` tries for each arm, on the dev split; the choice stands in
# TUNED. One tighter clipping: AdamW does not mind the scale of a gradient, so clipping can only
# change how much the steps with the largest gradients weigh. 1e-2 was added when 3e-3, then the
# edge of the grid, came out best for the first arms.
SWEPT = ((3e-4, 1.0), (1e-3, 1.0), (3e-3, 1.0), (1e-2, 1.0), (1e-3, 0.1))

# setting -> arm -> what its sweep chose. For a setting that is absent the values of SCALES stand,
# which no sweep has settled there: `make sweep` with the same SCALE, BASE and DATA writes its row.
TUNED: dict[str, dict[str, dict]] = {
    "small": {
        "emb-only": {"learning_rate": 0.003, "clip": 1.0},
        "rank-only": {"learning_rate": 0.003, "clip": 1.0},
        "joint-single": {"learning_rate": 0.003, "clip": 1.0},
        "joint-moe": {"learning_rate": 0.003, "clip": 1.0},
    },
}

# scale -> (layers, first adapted layer) of each size. On a card every layer counts, and sizes are
# bases: the same experiment with another BASE.
LADDER = {
    "smoke": ((2, 1), (3, 2)),
    "small": ((8, 4), (12, 8), (16, 12), (24, 20), (30, 26)),
    "full": ((None, 0),),
}

# What `make pilot` changes of a scale, one thing at a time, each specialist on the dev split. With
# the depth goes the first adapted layer: it is the last four that are adapted.
PILOT = {
    "as-is": {},
    "4-layers": {"layers": 4, "adapter_layers": 0},
    "8-layers": {"layers": 8, "adapter_layers": 4},
    "12-layers": {"layers": 12, "adapter_layers": 8},
    "24-layers": {"layers": 24, "adapter_layers": 20},
    "last-2-adapted": {"adapter_layers": 14},
    "last-8-adapted": {"adapter_layers": 8},
    "last-token": {"embedding_pooling": "last", "reranking_pooling": "last"},
    "bce": {"reranking_loss": "bce"},
    "40-steps": {"steps": 40, "train_queries": 640},
    "160-steps": {"steps": 160, "train_queries": 2560},
    "32-tokens": {"document_tokens": 32},
    "128-tokens": {"document_tokens": 128},
    "20-candidates": {"candidates": 20},
}

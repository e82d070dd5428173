"""UniMoER: one frozen decoder that embeds and reranks, as its user meets it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from model import saved, weights
from model.config import ModelConfig
from model.heads import truncate
from model.joint import Joint
from model.prefix import TextSet
from model.texts import usual_budget
from model.tokens import listed

__all__ = ["ModelConfig", "UniMoER"]


class UniMoER(Joint):
    """Embeds and reranks with one resident base.

    `UniMoER(config)` starts from the base: experts with B = 0, so it equals the base until it is
    trained. `from_pretrained` loads a saved folder.

    Args:
        device: where the base and all else lie; `from_pretrained` has it too.
        seed: of experts, routers and head; it gives the same values on every device.
        kernels: auto (Triton on CUDA, PyTorch elsewhere), triton or torch; see `kernels.choice`.
    """

    def encode(
        self,
        texts: Sequence[str],
        *,
        task: str = "document",
        instruction: str = "",
        dimensions: int | None = None,
        budget: int | None = None,
        progress: bool | None = None,
    ) -> Tensor:
        """Unit vectors of texts.

        Args:
            task: "query" or "document", which decides the template.
            instruction: in place of the model's own; see `Prompts.instructed`.
            dimensions: only the first of them, at length 1 again (Matryoshka); None: all D.
            budget: tokens of one batch; None: 2,048 on a CPU, `CARD_BUDGET` on a card.
            progress: a bar; None: from 1,000 texts up.
        Returns:
            (n, D) on the CPU, fp32 (float64 of a float64 model); the scores of a query are
            `similarity(query, documents)`.
        Raises:
            ValueError: what is no list of texts, no task, or no number of dimensions; or a vector
                is not finite in the model's dtype.
        """
        if task not in ("query", "document"):
            raise ValueError(f"task must be 'query' or 'document', got {task!r}")
        truncate(torch.zeros(0, self.decoder.config.hidden_size), dimensions)  # before the work
        texts = listed(texts, "texts")
        tokenizer = self.tokenizer.with_instruction(instruction)
        tokenize = tokenizer.queries if task == "query" else tokenizer.documents
        bar = len(texts) >= 1000 if progress is None else progress
        budget = budget or usual_budget(self.device, 2048)
        vectors = self.embed_all(TextSet(tokenize(texts)), budget=budget, progress=bar)
        return truncate(vectors, dimensions)

    def encode_query(
        self,
        texts: Sequence[str],
        *,
        dimensions: int | None = None,
        budget: int | None = None,
        progress: bool | None = None,
    ) -> Tensor:
        """`encode` with the query template."""
        options = {"dimensions": dimensions, "budget": budget, "progress": progress}
        return self.encode(texts, task="query", **options)

    def encode_document(
        self,
        texts: Sequence[str],
        *,
        dimensions: int | None = None,
        budget: int | None = None,
        progress: bool | None = None,
    ) -> Tensor:
        """`encode` with the document template."""
        options = {"dimensions": dimensions, "budget": budget, "progress": progress}
        return self.encode(texts, task="document", **options)

    @staticmethod
    def similarity(queries: Tensor, documents: Tensor) -> Tensor:
        """Cosine (Q, D') of unit vectors (Q, D) and (D', D)."""
        return queries @ documents.t()

    def predict(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        budget: int | None = None,
        progress: bool | None = None,
    ) -> Tensor:
        """Relevance in [0, 1] of (query, document) pairs, (n,); see `score_pairs`.

        Raises:
            ValueError: what is no list of pairs of texts; or a score is not finite.
        """
        bar = len(listed(pairs, "pairs", 2)) >= 1000 if progress is None else progress
        return self.relevance(self.score_pairs(pairs, budget=budget, progress=bar))

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        vectors: Tensor | None = None,
    ) -> list[tuple[int, float]]:
        """(index of the document, relevance), best first, ties in the order given. vectors: (n, D),
        see `score_lists`.

        Raises:
            ValueError: what is no list of texts; top_k below 0; or a score is not finite.
        """
        listed([query], "query")
        documents = listed(documents, "documents")
        if top_k is not None and top_k < 0:
            raise ValueError(f"top_k must be at least 0, or None for all, got {top_k}")
        bar = len(documents) >= 1000
        if vectors is None:
            scores = self.score_pairs([(query, text) for text in documents], progress=bar)
        else:
            lists = [(query, documents)]
            [scores] = self.score_lists(lists, vectors=[vectors], progress=bar)
        # By raw score: in fp32 the sigmoid of everything above 17 is 1.
        order = scores.argsort(descending=True, stable=True)[:top_k]
        return [(int(i), float(self.relevance(scores[i]))) for i in order]

    # On disk ---------------------------------------------------------------------------------

    def save_pretrained(self, folder: Path | str) -> None:
        """Write `config.json`, `adapters.safetensors` and `heads.safetensors`.

        The base is not copied: config.json names it (a folder by its whole path, so that the model
        loads from anywhere) and holds its fingerprint and the prompts.
        Each file is renamed into place whole. config.json goes first and comes last, so a folder
        that was being written over when the process died is an error, not a mixture.

        Raises:
            ValueError: after `compact`.
        """
        if any(getattr(module, "dropped", False) for module in self.modules()):
            raise ValueError("compact() dropped what would be saved: save before it, or load again")
        place = Path(self.config.base).expanduser()
        base = str(place.resolve()) if place.is_dir() else self.config.base
        settled = replace(self.config, base=base, revision=self.identity["revision"])
        saved.write(Path(folder), settled, self.identity, self.kept())

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        device: torch.device | str = "cpu",
        base: str | None = None,
        kernels: str = "auto",
    ) -> "UniMoER":
        """Load a folder written by `save_pretrained`.

        Args:
            base: where the base lies, if not where config.json says, nor at the end of that path
                from here (a folder that was moved alone).
        Raises:
            ValueError: files are missing or foreign, the base is not where it was or is another one
                than it was trained on, or a tensor is missing, unexpected or misshapen.
        """
        folder = Path(folder)
        config, expected = saved.read_config(folder)
        if base:
            config = replace(config, base=base, revision=None)
        elif Path(config.base).is_absolute():
            config = replace(config, base=saved.where(folder, config.base))
        model = cls(config, device, kernels=kernels)
        if (found := model.identity["fingerprint"]) != expected["fingerprint"]:
            raise ValueError(
                f"{folder} was trained on the base {expected['name']} (revision "
                f"{expected['revision']}) with fingerprint {expected['fingerprint']}, but "
                f"{config.base} has {found}: give the original base"
            )
        model.load_trained(saved.read_tensors(folder), str(folder))
        return model

    def load_trained(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Copy experts, routers and head; names and shapes must match exactly."""
        weights.copy_exactly(tensors, self.kept(), source)

"""UniMoER: one frozen decoder that embeds and reranks, with its experts, routers and heads."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.choice import use_triton
from model import bases, parallel, saved, weights
from model.config import DTYPES, DecoderConfig, ModelConfig
from model.heads import LinearScore, YesNoScore, run_pooled, truncate
from model.listwise import Interaction, Lists, by_query, in_order, own_projector, score_blocks
from model.lora import LinearGroup
from model.packed import Only, Packed
from model.prefix import TextSet
from model.pseudo import ByPseudoQuery, PseudoQuery
from model.router import TASKS, Router
from model.texts import in_batches, usual_budget
from model.tokens import Tokenizer, listed
from model.transformer import Decoder


class UniMoER(nn.Module):
    """Embeds and reranks with one resident base.

    `UniMoER(config)` starts from the base: experts with B = 0, so it equals the base until it is
    trained. `from_pretrained` loads a saved folder.

    Args:
        seed: of experts, routers and head; it gives the same values on every device.
        kernels: auto (Triton on CUDA, PyTorch elsewhere), triton or torch; see `kernels.choice`.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device | str = "cpu",
        seed: int = 0,
        kernels: str = "auto",
    ):
        super().__init__()
        fused = use_triton(kernels, device, DTYPES[config.dtype])
        folder = bases.resolve(config.base, config.revision)
        shape = DecoderConfig.read(folder, config.layers, config.causal)
        self.config, self.identity = config, bases.identity(folder)
        # The yes/no answer is read after the last word of the template, as it was trained.
        options = {"end_token": config.end_token, "pair_end": config.rerank_head != "yes_no"}
        self.tokenizer = Tokenizer(folder, config.prompts, config.document_tokens, **options)
        if self.tokenizer.end_id >= shape.vocab_size:
            raise ValueError(
                f"{folder}: the end token {self.tokenizer.end_token!r} has id "
                f"{self.tokenizer.end_id}, but the base embeds {shape.vocab_size} tokens: the "
                "tokenizer is another model's, or end_token was added without a row"
            )
        dtype = DTYPES[config.dtype]
        with torch.device(device):  # the weights are never in host memory whole
            self.decoder = Decoder(
                shape, config.lora, config.router, dtype, config.checkpointing, fused
            )
            head = None
            if config.rerank_head == "yes_no" and not shape.tie_word_embeddings:
                head = torch.zeros(shape.vocab_size, shape.hidden_size, dtype=dtype)
        targets = self.decoder.named_weights()
        if head is not None:
            targets["lm_head.weight"] = head
        weights.load_into(folder, targets, ignore=shape.unused)
        self.head: LinearScore | YesNoScore | Interaction | ByPseudoQuery
        rows = self.decoder.embed_tokens.weight
        if config.rerank_head == "linear":
            self.head = LinearScore(shape.hidden_size)
        elif config.rerank_head == "interaction":
            self.lists = Lists(self.tokenizer, config.list_tokens)
            own = own_projector(folder, shape.hidden_size)
            start = rows[self.tokenizer.end_id].cpu()
            self.head = Interaction(shape.hidden_size, self.lists.marks, start, own)
        elif config.rerank_head == "pseudo_query":
            self.head = ByPseudoQuery(self.tokenizer, PseudoQuery(tokens=config.list_tokens))
        else:
            rows = rows if head is None else head
            self.head = YesNoScore(*(rows[self.tokenizer.word_id(word)] for word in ("yes", "no")))
        if config.dtype == "float64":
            self.head.double()
        self.to(device)
        self.reset_parameters(seed)
        self.eval()

    def reset_parameters(self, seed: int) -> None:
        """Initialise experts, routers and head; the same seed gives the same values."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, LinearGroup | Router | LinearScore | YesNoScore | Interaction):
                module.reset_parameters(generator)

    @property
    def device(self) -> torch.device:
        return self.decoder.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.embed_tokens.weight.dtype

    def routers(self) -> dict[int, Router]:
        """The router of each routed layer."""
        found = ((i, getattr(layer, "router", None)) for i, layer in enumerate(self.decoder.layers))
        return {i: router for i, router in found if router is not None}

    def trained(self) -> dict[str, nn.Parameter]:
        """Every trainable parameter: experts, routers, head."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def kept(self) -> dict[str, nn.Parameter]:
        """What is saved: all that is trained, and what routers have that is not."""
        return {
            name: p for name, p in self.named_parameters() if p.requires_grad or ".router." in name
        }

    def compact(self) -> "UniMoER":
        """Keep what serving needs: no fp32 masters, two thirds of the experts' bytes in
        a 16-bit model, and no zeros between the blocks of the bordered weights.

        Results stay the same to rounding; the model can no longer be trained or saved.
        """
        self.decoder.drop_masters()
        return self

    # The two tasks on a packed batch ---------------------------------------------------------

    def hidden(
        self,
        batch: Packed,
        task: str,
        states: Tensor | None = None,
        base: bool = False,
        only: Only | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Final hidden states (N, D) for one task, and the routing weights by layer.

        Args:
            states: what enters the first adapted layer, where it was computed before, (N, D).
            base: leave experts and routers out.
            only: one token of each text, whose states (B, D) are wanted.
        """
        tasks = torch.full((len(batch.whole.lengths),), TASKS.index(task), device=self.device)
        first = 0
        if states is not None:
            assert self.config.lora is not None
            first = self.config.lora.first_layer
        elif isinstance(self.head, Interaction) and task == "reranking":
            states = self.head.inputs(self.decoder.embed_tokens, batch.input_ids)
        options = {"first_layer": first, "base": base, "only": only}
        return self.decoder(batch, tasks, hidden=states, **options)

    def pooled(
        self, batch: Packed, task: str, states: Tensor | None = None, base: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """(B, D) in fp32 or wider, what a task's head reads, and the routing weights by layer."""
        run = partial(self.hidden, batch, task, states, base)
        return run_pooled(run, batch.whole, getattr(self.config, f"{task}_pooling"))

    def embed(
        self, batch: Packed, states: Tensor | None = None, base: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Unit vectors (B, D) of a batch of texts, and the routing weights by layer."""
        vectors, routing = self.pooled(batch, "embedding", states, base)
        return F.normalize(vectors, dim=-1), routing

    def score(
        self, batch: Packed, states: Tensor | None = None, base: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Relevance logits (B,) of a batch of pairs, and the routing weights by layer.

        With an interaction head the texts are lists, and the scores those of all their documents.
        A pseudo-query is no score of a text: see `score_lists`.
        """
        assert not isinstance(self.head, ByPseudoQuery), "a pseudo-query scores lists"
        if isinstance(self.head, Interaction):
            vectors, routing = self.marked(batch, states, base)
            return self.head.cosines(vectors, batch), routing
        read, routing = self.pooled(batch, "reranking", states, base)
        return self.head(read), routing

    def marked(
        self, batch: Packed, states: Tensor | None = None, base: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Vectors (M, 512) of the M marks of a batch of lists; else as above."""
        assert isinstance(self.head, Interaction), f"{self.config.rerank_head} reads no marks"
        hidden, routing = self.hidden(batch, "reranking", states, base)
        return self.head(hidden[self.head.places(batch.input_ids)]), routing

    # Many texts ------------------------------------------------------------------------------

    def embed_all(
        self,
        texts: TextSet,
        *,
        budget: int | None = None,
        base: bool = False,
        progress: bool = False,
        shared: bool = False,
    ) -> Tensor:
        """(n, D) unit vectors of n tokenized texts, in their order. shared: several processes were
        asked the same and do it together (`model.parallel`)."""
        width = self.decoder.config.hidden_size
        out = torch.zeros(len(texts.ids), width, dtype=torch.promote_types(self.dtype, torch.float))
        options = {"budget": budget, "base": base, "progress": progress, "shared": shared}
        done = in_batches(self.decoder, texts, self.embed, title="encode", trie=True, **options)
        for indices, vectors in done:
            out[indices] = vectors
        return parallel.together(out, self.device) if shared else out

    def score_all(
        self,
        texts: TextSet,
        *,
        budget: int | None = None,
        progress: bool = False,
        shared: bool = False,
    ) -> Tensor:
        """(n,) logits of n tokenized pairs, in their order. shared: as above."""
        assert not self.config.listwise, f"{self.config.rerank_head} scores lists"
        out = torch.zeros(len(texts.ids), dtype=torch.promote_types(self.dtype, torch.float))
        options = {"budget": budget, "progress": progress, "shared": shared}
        done = in_batches(self.decoder, texts, self.score, title="rerank", trie=True, **options)
        for indices, scores in done:
            out[indices] = scores
        return parallel.together(out, self.device) if shared else out

    def score_lists(
        self,
        lists: Sequence[tuple[str, Sequence[str]]],
        *,
        vectors: Sequence[Tensor] | None = None,
        budget: int | None = None,
        progress: bool = False,
        shared: bool = False,
    ) -> list[Tensor]:
        """Cosines (n,) of the n documents of each (query, documents), which are read in the order
        given; see `model.listwise` and `model.pseudo`. shared: as above.

        Args:
            vectors: (n, D) of each list's documents, which a pseudo-query then need not encode.
        Raises:
            ValueError: the head scores pairs; vectors for another head, which reads the documents
                themselves; or more or fewer of them than documents.
        """
        options = {"budget": budget, "progress": progress, "shared": shared}
        if isinstance(self.head, ByPseudoQuery):
            return self.head.scores(partial(self.embed_all, **options), lists, vectors)
        if vectors is not None:
            raise ValueError(f"rerank_head={self.config.rerank_head!r} has no use for vectors")
        if not isinstance(self.head, Interaction):
            raise ValueError(
                f"rerank_head={self.config.rerank_head!r} scores pairs: use score_pairs, predict "
                "or rank"
            )
        made = [self.lists.blocks(query, documents) for query, documents in lists]
        texts = TextSet([block.ids for blocks in made for block in blocks])
        dtype = torch.promote_types(self.dtype, torch.float)
        rows = in_batches(self.decoder, texts, self.marked, title="rerank", **options)
        marks = in_order(made, rows, dtype)
        return score_blocks(made, parallel.together(marks, self.device) if shared else marks)

    def score_pairs(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        budget: int | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Raw scores (n,) of pairs: logits. A listwise head takes those of one query as a list, in
        the order given, and its scores are cosines. budget: None: 2,048 tokens on a CPU."""
        budget = budget or usual_budget(self.device, 2048)
        if not self.config.listwise:
            # Each once: equal ones tie to the last bit, wherever they would stand in a batch.
            place = {pair: i for i, pair in enumerate(dict.fromkeys((q, d) for q, d in pairs))}
            texts = TextSet(self.tokenizer.pairs(list(place)))
            scores = self.score_all(texts, budget=budget, progress=progress)
            return scores[[place[q, d] for q, d in pairs]]
        lists, places = by_query(pairs)
        found = self.score_lists(lists, budget=budget, progress=progress)
        return torch.cat([torch.zeros(0), *found])[places]

    def relevance(self, scores: Tensor) -> Tensor:
        """Raw scores -> [0, 1]: the sigmoid of logits, (1 + s) / 2 of cosines."""
        return (1 + scores) / 2 if self.config.listwise else scores.sigmoid()

    def encode(
        self,
        texts: Sequence[str],
        *,
        task: str = "document",
        dimensions: int | None = None,
        budget: int | None = None,
        progress: bool | None = None,
    ) -> Tensor:
        """Unit vectors of texts.

        Args:
            task: "query" or "document", which decides the template.
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
        tokenize = self.tokenizer.queries if task == "query" else self.tokenizer.documents
        bar = len(texts) >= 1000 if progress is None else progress
        budget = budget or usual_budget(self.device, 2048)
        vectors = self.embed_all(TextSet(tokenize(texts)), budget=budget, progress=bar)
        return truncate(vectors, dimensions)

    def encode_query(self, texts: Sequence[str], **options) -> Tensor:
        """`encode` with the query template."""
        return self.encode(texts, task="query", **options)

    def encode_document(self, texts: Sequence[str], **options) -> Tensor:
        """`encode` with the document template."""
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
        if vectors is None:
            scores = self.score_pairs([(query, text) for text in documents])
        else:
            [scores] = self.score_lists([(query, documents)], vectors=[vectors])
        # By raw score: in fp32 the sigmoid of everything above 17 is 1.
        order = scores.argsort(descending=True, stable=True)[:top_k]
        return [(int(i), float(self.relevance(scores[i]))) for i in order]

    # On disk ---------------------------------------------------------------------------------

    def save_pretrained(self, folder: Path | str) -> None:
        """Write `config.json`, `adapters.safetensors` and `heads.safetensors`.

        The base is not copied: config.json names it and holds its fingerprint and the prompts.
        Each file is renamed into place whole. config.json goes first and comes last, so a folder
        that was being written over when the process died is an error, not a mixture.

        Raises:
            ValueError: after `compact`.
        """
        if any(getattr(module, "dropped", False) for module in self.modules()):
            raise ValueError("compact() dropped what would be saved: save before it, or load again")
        settled = replace(self.config, revision=self.identity["revision"])
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
            base: where the base lies, if not where config.json says (a moved local folder).
        Raises:
            ValueError: files are missing or foreign, the base is another one than it was trained
                on, or a tensor is missing, unexpected or misshapen.
        """
        folder = Path(folder)
        config, expected = saved.read_config(folder)
        if base:
            config = replace(config, base=base, revision=None)
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

"""One frozen decoder with its experts, routers and head, on token ids and packed batches."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.choice import use_triton
from model import bases, parallel, weights
from model.config import DTYPES, DecoderConfig, ModelConfig
from model.heads import LinearScore, YesNoScore, run_pooled
from model.listwise import Interaction, Lists, by_query, in_order, own_projector, score_blocks
from model.lora import LinearGroup
from model.packed import Only, Packed
from model.prefix import TextSet
from model.pseudo import ByPseudoQuery, PseudoQuery
from model.router import TASKS, Router
from model.texts import in_batches, usual_budget
from model.tokens import Tokenizer
from model.transformer import Decoder


class Joint(nn.Module):
    """What `UniMoER` is made of: the base with its experts and heads, run over tokenized texts.

    Args:
        device, seed, kernels: as of `UniMoER`.
    Raises:
        ValueError: as `bases.resolve`, `DecoderConfig.read`, `Tokenizer` and `weights.load_into`;
            or the tokenizer's end token is none that the base embeds.
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

    def compact(self) -> Self:
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
        instruction: str = "",
        budget: int | None = None,
        progress: bool = False,
        shared: bool = False,
    ) -> list[Tensor]:
        """Cosines (n,) of the n documents of each (query, documents), which are read in the order
        given; see `model.listwise` and `model.pseudo`. shared: as above.

        Args:
            vectors: (n, D) of each list's documents, which a pseudo-query then need not encode.
            instruction: of a benchmark, which an interaction head reads (`Lists.blocks`); a
                pseudo-query is asked with its own (`model.pseudo`).
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
        blocks = partial(self.lists.blocks, instruction=instruction)
        made = [blocks(query, documents) for query, documents in lists]
        texts = TextSet([block.ids for blocks in made for block in blocks])
        dtype = torch.promote_types(self.dtype, torch.float)
        rows = in_batches(self.decoder, texts, self.marked, title="rerank", **options)
        marks = in_order(made, rows, dtype)
        return score_blocks(made, parallel.together(marks, self.device) if shared else marks)

    def score_pairs(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        instruction: str = "",
        budget: int | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Raw scores (n,) of pairs: logits. A listwise head takes those of one query as a list, in
        the order given, and its scores are cosines.

        Args:
            instruction: in place of the model's own, where the pair's template has a place for it;
                of lists as of `score_lists`.
            budget: None: 2,048 tokens on a CPU.
        """
        budget = budget or usual_budget(self.device, 2048)
        if not self.config.listwise:
            # Each once: equal ones tie to the last bit, wherever they would stand in a batch.
            place = {pair: i for i, pair in enumerate(dict.fromkeys((q, d) for q, d in pairs))}
            tokenizer = self.tokenizer.with_instruction(instruction)
            texts = TextSet(tokenizer.pairs(list(place)))
            scores = self.score_all(texts, budget=budget, progress=progress)
            return scores[[place[q, d] for q, d in pairs]]
        lists, places = by_query(pairs)
        options: dict[str, Any] = {"budget": budget, "progress": progress}
        found = self.score_lists(lists, instruction=instruction, **options)
        return torch.cat([torch.zeros(0), *found])[places]

    def relevance(self, scores: Tensor) -> Tensor:
        """Raw scores -> [0, 1]: the sigmoid of logits, (1 + s) / 2 of cosines."""
        return (1 + scores) / 2 if self.config.listwise else scores.sigmoid()

"""The router of one layer: one set of expert weights per text, or per token."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.bordered import Routing
from kernels.entmax import entmax15
from kernels.reference import running_sum
from kernels.route import route
from kernels.sparsegen import sparsegen
from model.weights import draw_into

TASKS = ("embedding", "reranking")
WIDEST = 256  # of the MLP
Part = tuple[int, Tensor] | None


def route_task(router: "Router", logits: Tensor, tasks: Tensor) -> Tensor:
    """Hard: the expert that carries the task's name (jina-embeddings-v3, arXiv 2409.10173)."""
    embedding, reranking = (router.routed.index(task) for task in TASKS)
    # Numbers, not a table: a tensor made of them would wait for the card in every layer.
    roles = torch.full_like(tasks, embedding).masked_fill_(tasks == 1, reranking)
    lanes = torch.arange(len(router.routed), device=tasks.device)
    return (roles[:, None] == lanes).to(logits.dtype)


def route_uniform(router: "Router", logits: Tensor, tasks: Tensor) -> Tensor:
    """Every expert alike: the control that has the parameters of a mixture and no routing."""
    return torch.full_like(logits, 1 / logits.shape[-1])


def route_softmax(router: "Router", logits: Tensor, tasks: Tensor) -> Tensor:
    return logits.softmax(-1)


def route_sparsegen(router: "Router", logits: Tensor, tasks: Tensor) -> Tensor:
    """Sparsegen with a learned c per layer; see `kernels.sparsegen`."""
    return sparsegen(logits, router.c)


def route_entmax15(router: "Router", logits: Tensor, tasks: Tensor) -> Tensor:
    return entmax15(logits)


def route_tsallis(router: "Router", logits: Tensor, tasks: Tensor) -> Tensor:
    """Soft where the softmax p is undecided, top-p where it is sure (DynMoLE, arXiv 2504.00661).

    Undecided: Tsallis' entropy S_q = (1 - sum p^q) / (q - 1) above TSALLIS_THRESHOLD of its
    maximum. Else the most likely experts whose p add up to at most TSALLIS_TOP_P, at least one,
    renormalised. The choice is constant in the gradient. S_q of each row is `Router.penalty`.
    """
    p = logits.softmax(-1)
    entropy = tsallis_entropy(p)
    router.penalty = entropy
    experts = p.shape[-1]
    most = tsallis_entropy(torch.full_like(p[:1], 1 / experts))
    ordered, order = p.sort(-1, descending=True)
    kept = running_sum(ordered) <= TSALLIS_TOP_P
    kept[:, 0] = True
    kept = kept.gather(-1, order.argsort(-1)) | (entropy > TSALLIS_THRESHOLD * most)[:, None]
    chosen = p * kept
    return chosen / chosen.sum(-1, keepdim=True)


TSALLIS_Q, TSALLIS_TOP_P = 1.1, 0.75
# The paper's 0.9 is for 8 experts, where S_q is at most 1.877; over 3 it is at most 1.04.
TSALLIS_THRESHOLD = 0.9 / 1.877


def tsallis_entropy(p: Tensor) -> Tensor:
    """S_q (...) of rows p (..., E), which need not be strictly positive."""
    return (1 - p.clamp(min=1e-20).pow(TSALLIS_Q).sum(-1)) / (TSALLIS_Q - 1)


def route_similarity(router: "Router", logits: Tensor, tasks: Tensor) -> Tensor:
    """Hard: the expert whose pilots are most similar to the text; see `Router.logits`."""
    return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)


# A new router is one function and one line here, and one arm in experiments.py.
ROUTES = {
    "task": route_task,
    "uniform": route_uniform,
    "softmax": route_softmax,
    "sparsegen": route_sparsegen,
    "entmax15": route_entmax15,
    "tsallis": route_tsallis,
    "similarity-mean": route_similarity,
    "similarity-max": route_similarity,
}
SIMILARITY = ("similarity-mean", "similarity-max")
NOT_LEARNED = ("task", "uniform", *SIMILARITY)  # every other router has an MLP


def learned(kind: str, frozen: bool = False) -> bool:
    """Whether a router of this kind ("": none) is trained."""
    return kind not in ("", *NOT_LEARNED) and not frozen


@dataclass(frozen=True)
class RouterConfig:
    """kind: one of `ROUTES`.

    hidden: width of the MLP. per_token: weigh each token by its own state, not each text by the
    mean of its tokens. always_on: an expert of weight 1 outside the simplex, or "".
    noise: standard deviation of Gaussian noise on the logits, scaled by `Router.anneal`.
    expert_dropout: probability of dropping an expert, the others renormalised.
    task_prior: added to the logit of the expert that has the task's name, scaled by
    `Router.anneal`. Noise, dropout and prior act in training alone.
    init_std: standard deviation of the last layer's first weights. frozen: they stay as they are,
    a router at random. pilots: of each expert, for routing by similarity.
    """

    kind: str = "sparsegen"
    hidden: int = 64
    always_on: str = ""
    noise: float = 0.0
    expert_dropout: float = 0.0
    task_prior: float = 0.0
    per_token: bool = False
    init_std: float = 0.02
    frozen: bool = False
    pilots: int = 4

    def __post_init__(self):
        if self.kind not in ROUTES:
            raise ValueError(f"router must be one of {sorted(ROUTES)}, got {self.kind!r}")
        if not 0 <= self.expert_dropout < 1:
            raise ValueError(f"expert_dropout must lie in [0, 1), got {self.expert_dropout}")
        if self.noise < 0 or self.init_std < 0:
            raise ValueError(
                f"noise and init_std are standard deviations, got {self.noise} and {self.init_std}"
            )
        if self.kind in SIMILARITY and self.per_token:
            raise ValueError(f"{self.kind} compares texts, so it cannot route per token")
        if not 1 <= self.hidden <= WIDEST:
            raise ValueError(
                f"hidden must lie in [1, {WIDEST}], as wide as the kernel keeps in a card's shared "
                f"memory; got {self.hidden}"
            )
        if self.pilots < 1:
            raise ValueError(f"pilots must be at least 1, got {self.pilots}")


class Router(nn.Module):
    """Pooled hidden state (B, D) -> MLP -> logits -> weights (B, E) in fp32.

    Row b depends on row b alone, so the routing of a text never depends on the rest of its batch.
    With `per_token` the rows are tokens.
    """

    def __init__(self, features: int, experts: tuple[str, ...], config: RouterConfig):
        super().__init__()
        if config.always_on and config.always_on not in experts:
            raise ValueError(f"always_on {config.always_on!r} is none of the experts {experts}")
        self.config, self.experts = config, experts
        self.routed = tuple(name for name in experts if name != config.always_on)
        if not self.routed:
            raise ValueError(f"no expert of {experts} is left to be routed beside always_on")
        if config.kind in ("task", *SIMILARITY) or config.task_prior:
            missing = [task for task in TASKS if task not in self.routed]
            if missing:
                raise ValueError(
                    f"routing by task needs experts named {TASKS}, {missing} not in {self.routed}"
                )
        if config.kind in SIMILARITY and len(self.routed) != len(TASKS):
            raise ValueError(
                f"{config.kind} has pilots for {TASKS} alone, but is to route {self.routed}: "
                "leave the others out or make one always_on"
            )
        self.anneal = 1.0  # the training loop takes it from 1 to 0
        if config.kind not in NOT_LEARNED:
            self.up = nn.Linear(features, config.hidden)
            self.down = nn.Linear(config.hidden, len(self.routed))
        if config.kind == "sparsegen":
            self.v = nn.Parameter(torch.empty(()))
        if config.kind in SIMILARITY:
            size = (len(self.routed), config.pilots, features)
            self.pilots = nn.Parameter(torch.zeros(size), requires_grad=False)
        # Of the rows of the last call: for kinds that have one; before experts were dropped.
        self.penalty: Tensor | None = None
        self.given: Tensor | None = None
        self.reset_parameters()
        if config.frozen:
            self.requires_grad_(False)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Small logits, so every expert starts with a share and a gradient."""
        if self.config.kind in NOT_LEARNED:
            return
        draw_into(
            self.up.weight,
            lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5), generator=generator),
        )
        draw_into(
            self.down.weight,
            lambda w: nn.init.normal_(w, std=self.config.init_std, generator=generator),
        )
        nn.init.zeros_(self.up.bias)
        nn.init.zeros_(self.down.bias)
        if self.config.kind == "sparsegen":
            # c = 0.1 + softplus(v) starts at 2: with three experts dense where no logit is 1 above
            # another.
            nn.init.constant_(self.v, math.log(math.expm1(1.9)))

    @property
    def c(self) -> Tensor:
        """Sparsegen's 1 - lambda, at least 0.1: below it one expert wins and all gradients die."""
        return 0.1 + F.softplus(self.v)

    def logits(self, pooled: Tensor) -> Tensor:
        """(B, D) -> (B, routed experts); zeros where nothing is learned.

        By similarity it is the cosine with an expert's pilots: their mean, as RouterRetriever is
        described, or the largest, as its code does (arXiv 2409.02685).
        """
        if self.config.kind in SIMILARITY:
            if not self.pilots.any():
                raise ValueError(f"{self.config.kind} has no pilots yet: train.pilots makes them")
            pilots = F.normalize(self.pilots.to(pooled.dtype), dim=-1)
            cosine = torch.einsum("bd,ekd->bek", F.normalize(pooled, dim=-1), pilots)
            return cosine.mean(-1) if self.config.kind == "similarity-mean" else cosine.amax(-1)
        if self.config.kind in NOT_LEARNED:
            return pooled.new_zeros(len(pooled), len(self.routed))
        return self.down(F.silu(self.up(F.rms_norm(pooled, pooled.shape[-1:]))))

    def offset(self, tasks: Tensor, part: Part = None) -> Tensor | None:
        """(B, routed experts), what training adds to the logits; None for nothing."""
        if not self.training or not (self.config.task_prior or self.config.noise):
            return None
        shape = (len(tasks), len(self.routed))
        added = torch.zeros(shape, dtype=self._dtype, device=tasks.device)
        if self.config.task_prior:
            added = self.config.task_prior * self.anneal * route_task(self, added, tasks)
        if self.config.noise:
            added = added + self.config.noise * self.anneal * _drawn(torch.randn, added, part)
        return added

    @property
    def _dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.parameters()), torch.float32)

    def in_kernel(self, tasks: Tensor, part: Part = None) -> Routing | None:
        """What a kernel needs to route tokens while it reads them; None where it cannot.

        tasks: (N,), part: as for `forward`. Expert dropout and an always-on expert come after the
        projection, so they are left to `forward`.
        """
        c = self.config
        if c.kind != "sparsegen" or c.always_on or (self.training and c.expert_dropout):
            return None
        return Routing(self._mlp(), self.c, self.offset(tasks, part))

    def _mlp(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.up.weight, self.up.bias, self.down.weight, self.down.bias

    def forward(
        self, pooled: Tensor, tasks: Tensor, fused: bool = False, part: Part = None
    ) -> Tensor:
        """Expert weights of each text.

        Args:
            pooled: (B, D) fp32 (or fp64), the mean over a text's own tokens; with `per_token`
                (N, D), each token's state.
            tasks: (B,) int64, the index in TASKS of what each text is for.
            fused: run the kernel where the router has one.
            part: where the rows are part of a larger batch, so that each draws the noise that it
                would draw there: the rows of all, and the place of each of these.
        Returns:
            (B, E): on the simplex over the routed experts, 1 for the always-on one.
        """
        offset = self.offset(tasks, part)
        if fused and self.config.kind == "sparsegen":
            weights = route(pooled, *self._mlp(), self.c, offset)
        else:
            logits = self.logits(pooled)
            logits = logits if offset is None else logits + offset
            weights = ROUTES[self.config.kind](self, logits, tasks)
        self.given = None
        if self.training and self.config.expert_dropout:
            self.given = self._with_always_on(weights.detach())
            kept = _drawn(torch.rand, weights, part) >= self.config.expert_dropout
            weights = _drop(weights, kept)
        return self._with_always_on(weights)

    def _with_always_on(self, weights: Tensor) -> Tensor:
        """(B, routed experts) -> (B, E)."""
        if not self.config.always_on:
            return weights
        at = self.experts.index(self.config.always_on)
        one = torch.ones_like(weights[:, :1])
        return torch.cat((weights[:, :at], one, weights[:, at:]), 1)


def _drawn(draw: Callable[..., Tensor], like: Tensor, part: Part) -> Tensor:
    """Random numbers (B, routed experts) by `torch.randn` or `torch.rand`."""
    options = {"dtype": like.dtype, "device": like.device}
    if part is None:
        return draw(like.shape, **options)
    count, rows = part
    return draw((count, like.shape[1]), **options)[rows]


def _drop(weights: Tensor, kept: Tensor) -> Tensor:
    """Drop experts and renormalise; a text that would lose all of its weight keeps it."""
    kept = weights * kept
    total = kept.sum(-1, keepdim=True)
    alive = total > 0
    return torch.where(alive, kept / torch.where(alive, total, torch.ones_like(total)), weights)

"""Frozen linears that share an input, with N LoRA experts each (arXiv 2106.09685)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels import moe_lora
from kernels.bordered import Routing, fused_linear, routed_linear
from kernels.choice import has_matrix_units
from kernels.dropout import dropout_mask
from kernels.moe_lora import Pieces, bordered_linear, make_layout
from kernels.segments import Segments
from kernels.shrink import Columns, Group
from model.weights import draw_into

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoRAConfig:
    """N experts per linear.

    experts: names, in the order of the router's weights.
    ranks: r_i of each expert. alphas: alpha_i; the delta of expert i is scaled by alpha_i / r_i.
    targets: which of the seven projections have experts.
    first_layer: layers below it stay bare.
    dropout: of the input on its way to A, in training alone.
    """

    experts: tuple[str, ...]
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    targets: tuple[str, ...] = PROJECTIONS
    first_layer: int = 0
    dropout: float = 0.0

    def __post_init__(self):
        if not len(self.experts) == len(self.ranks) == len(self.alphas) >= 1:
            raise ValueError(
                f"experts {self.experts}, ranks {self.ranks} and alphas {self.alphas} "
                "must name the same number of experts, at least one"
            )
        if len(set(self.experts)) != len(self.experts):
            raise ValueError(f"expert names must differ, got {self.experts}")
        if min(self.ranks) < 1:
            raise ValueError(f"every rank must be at least 1, got {self.ranks}")
        unknown = set(self.targets) - set(PROJECTIONS)
        if unknown or not self.targets:
            raise ValueError(
                f"targets must be some of {PROJECTIONS}, got unknown {sorted(unknown)}"
                if unknown
                else f"targets is empty: name some of {PROJECTIONS}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")

    @property
    def total_rank(self) -> int:
        return sum(self.ranks)

    @property
    def scales(self) -> tuple[float, ...]:
        """alpha_i / r_i of each expert."""
        return tuple(a / r for a, r in zip(self.alphas, self.ranks, strict=True))

    def slices(self) -> dict[str, slice]:
        """Where each expert lies along the concatenated rank."""
        ends = [sum(self.ranks[: i + 1]) for i in range(len(self.ranks))]
        return {
            name: slice(end - rank, end)
            for name, end, rank in zip(self.experts, ends, self.ranks, strict=True)
        }


class LinearGroup(nn.Module):
    """Linears of one input, frozen, in one bordered weight; the experts' masters beside it.

    `lora_A[name]` (R, D) and `lora_B[name]` (O, R) hold all experts, concatenated along the rank.
    They are fp32 (fp64 for an fp64 model); the borders of the weight are copies in the compute
    dtype, renewed in `forward` whenever a master has changed since (with gradients on, a change in
    place through `.data` is not seen before the next backward).
    """

    def __init__(
        self, in_features: int, outs: dict[str, int], lora: LoRAConfig | None, dtype: torch.dtype
    ):
        super().__init__()
        targets = [lora is not None and name in lora.targets for name in outs]
        self.adapted_names = [name for name, has in zip(outs, targets, strict=True) if has]
        rank = lora.total_rank if lora and self.adapted_names else 0
        self.layout = make_layout(in_features, list(outs.values()), targets, rank)
        self.outs, self.dropout = outs, lora.dropout if lora else 0.0
        self.bordered: Tensor
        self.register_buffer(
            "bordered", torch.zeros(self.layout.shape, dtype=dtype), persistent=False
        )
        # Which expert each rank column of M belongs to, and its scale, as kernels read them.
        owner = torch.full((len(self.adapted_names), self.layout.padded), -1, dtype=torch.int32)
        factor = torch.zeros(owner.shape, dtype=torch.float32)
        if lora is not None and rank:
            for i, (at, scale) in enumerate(zip(lora.slices().values(), lora.scales, strict=True)):
                owner[:, at], factor[:, at] = i, scale
        self.column_expert: Tensor
        self.column_scale: Tensor
        self.register_buffer("column_expert", owner.flatten(), persistent=False)
        self.register_buffer("column_scale", factor.flatten(), persistent=False)
        master = torch.float64 if dtype == torch.float64 else torch.float32
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for name in self.adapted_names:
            self.lora_A[name] = nn.Parameter(torch.empty(rank, in_features, dtype=master))
            self.lora_B[name] = nn.Parameter(torch.zeros(outs[name], rank, dtype=master))
        self.dropped = False  # by `drop_masters`
        self.sharded = False  # by `model.sharding`, which then renews the borders
        self.settled = False  # by `settle`
        self._copied: tuple | None = None
        self._stepped = False  # whether an optimizer may have run since that copy
        if rank:
            self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """A ~ Kaiming uniform with a = sqrt(5), i.e. U(-1/sqrt(D), 1/sqrt(D)); B = 0."""
        for name in self.lora_A:
            draw_into(
                self.lora_A[name],
                lambda a: nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator),
            )
            nn.init.zeros_(self.lora_B[name])

    def weight(self, name: str) -> Tensor:
        """W (O, D) of one linear: a view into the bordered weight."""
        return self.bordered[self._linear(name).rows, self.layout.x]

    def _linear(self, name: str):
        return self.layout.linears[list(self.outs).index(name)]

    def _masters(self) -> list[Tensor]:
        return [p for name in self.lora_A for p in (self.lora_A[name], self.lora_B[name])]

    def borders(self) -> list[tuple[slice, slice, Tensor]]:
        """Rows and columns of M, and the master that is copied there."""
        found, rank = [], self.layout.rank
        for name in self.adapted_names:
            at = self._linear(name)
            a_rows = slice(at.rank_rows.start, at.rank_rows.start + rank)
            b_cols = slice(at.spare.start, at.spare.start + rank)
            found.append((a_rows, self.layout.x, self.lora_A[name]))
            found.append((at.rows, b_cols, self.lora_B[name]))
        return found

    @torch.no_grad()
    def _copy_masters(self, masters: list[Tensor], always: bool) -> None:
        """Renew the borders of M where the masters were written since the last copy.

        `always`: without asking, which also sees what `p.data[...] = ` wrote; the versions do not.
        """
        seen = [(id(p), p.data_ptr(), 0 if p.is_inference() else p._version) for p in masters]
        state = tuple(seen), self.bordered.data_ptr()
        same = state == self._copied
        if same and not self._stepped and not always:
            return
        # Fused optimizers write without raising the version, so copy after every backward. Then the
        # values may well be the same, and graphs that wait for theirs must not be told otherwise.
        bordered = self.bordered.data if same else self.bordered
        for rows, columns, master in self.borders():
            bordered[rows, columns].copy_(master)
        self._copied, self._stepped = state, False

    def drop_masters(self) -> None:
        """Keep what a forward pass reads alone, in the compute dtype, without M's blocks of zeros:
        no training after this, and nothing to save."""
        if self.dropped or not self.adapted_names:
            return
        self._copy_masters(self._masters(), always=True)
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        pieces = Pieces.of(self.layout, self.bordered)
        for i, window in enumerate(pieces.windows):
            self.register_buffer(f"window{i}", window.contiguous(), persistent=False)
        self.register_buffer("piece_a", pieces.a.contiguous(), persistent=False)
        self.bordered = self.bordered.new_empty(0)
        self.dropped = True

    def _pieces(self) -> Pieces:
        """Looked up anew each time: `.to(device)` puts other tensors in their place."""
        if not self.dropped:
            return Pieces.of(self.layout, self.bordered)
        windows = (self.get_buffer(f"window{i}") for i in range(len(self.layout.windows)))
        return Pieces(tuple(windows), self.get_buffer("piece_a"))

    def _mark_stepped(self, grad: Tensor) -> None:
        self._stepped = True

    def _keep(self, x: Tensor, places: Tensor | None) -> Tensor | None:
        """What dropout does to the experts' input."""
        if not self.training or self.dropout == 0:
            return None
        places = torch.arange(len(x), device=x.device) if places is None else places
        return dropout_mask(places, self.layout.in_features, self.dropout, x.dtype)

    def forward(
        self, x: Tensor, gates: Tensor | None, places: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """All linears of the group, in the order they were named.

        Args:
            x: (N, D).
            gates: w_i s_i repeated over the ranks, (N, R) or (1, R); None for the base alone.
            places: (N,) int64, which rows of a larger batch these are, for dropout; None: all.
        Returns:
            one (N, O) tensor per linear.
        """
        if gates is None or not self.adapted_names:
            return self._base(x).split(list(self.outs.values()), 1)
        if self.dropped:
            return moe_lora.forward(self.layout, self._pieces(), x, x, gates)[2]
        masters, keep = self._renewed(), self._keep(x, places)
        outputs = bordered_linear(self.layout, self.bordered, x, gates, masters, keep)
        if outputs[0].requires_grad:
            outputs[0].register_hook(self._mark_stepped)
        return outputs

    def _base(self, x: Tensor) -> Tensor:
        """x W' (N, O), experts left out."""
        if self.dropped:
            return torch.cat([x @ w.t() for w, _ in self._pieces().linears(self.layout)], 1)
        return x @ self.bordered[: self.layout.out_features, self.layout.x].t()

    # On wide buffers, by kernels -------------------------------------------------------------

    @property
    def margins(self) -> tuple[int, int]:
        """Spare columns left and right of x in what `fused` reads."""
        return self.layout.x.start, self.layout.shape[1] - self.layout.x.stop

    def _group(self) -> Group:
        columns = Columns(self.column_expert, self.column_scale)
        units = has_matrix_units(self.column_expert.device)
        whole = None if self.dropped else self.bordered
        return Group(self.layout, whole, self._pieces(), columns, units)

    def settle(self, settled: bool) -> None:
        """Renew the borders, and until it is taken back without gradients too by the masters'
        versions alone: to copy them is 14 small kernels in every layer of a card."""
        if settled and not self.dropped and not self.sharded:
            self._copy_masters(self._masters(), always=True)
        self.settled = settled

    def _renewed(self) -> list[Tensor]:
        masters = self._masters()
        if not self.dropped and not self.sharded:
            always = not (torch.is_grad_enabled() or self.settled)
            self._copy_masters(masters, always)
        return masters

    def fused(
        self,
        x: Tensor,
        segments: Segments,
        weights: Tensor | None,
        mode: int | None,
        places: Tensor | None = None,
    ) -> Tensor:
        """All linears of the group: `kernels.bordered.fused_linear`; mode None for the base alone.

        Args:
            x: (N, D), or as wide as `margins` says. weights: w_i, the scales not yet in them.
        Returns:
            (N, O + anything): the outputs in the order in which the linears were named.
        """
        if mode is None or not self.adapted_names:
            left = 0 if x.shape[1] == self.layout.in_features else self.layout.x.start
            return self._base(x[:, left : left + self.layout.in_features])
        group, masters, keep = self._group(), self._renewed(), self._keep(x, places)
        y = fused_linear(group, x, weights, segments, masters, mode, keep)
        if y.requires_grad:
            y.register_hook(self._mark_stepped)
        return y

    def routed(
        self, x: Tensor, segments: Segments, routing: Routing, places: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same with a router of tokens, whose weights (N, E) are returned too."""
        group, masters, keep = self._group(), self._renewed(), self._keep(x, places)
        y, weights = routed_linear(group, x, routing, segments, masters, keep)
        if y.requires_grad:
            y.register_hook(self._mark_stepped)
        return y, weights


class Adapted(NamedTuple):
    """A linear that has experts: `group.lora_A[name]`, a parameter `<prefix>.lora_A.<name>`."""

    layer: int
    prefix: str
    name: str
    group: LinearGroup


def adapted(model: nn.Module) -> Iterator[Adapted]:
    """Every linear of a model that has experts, from the first layer to the last."""
    for prefix, group in model.named_modules():
        if isinstance(group, LinearGroup):
            for name in group.adapted_names:
                yield Adapted(layer_of(prefix), prefix, name, group)


def layer_of(prefix: str) -> int:
    """The index in `decoder.layers.12.mlp.down`."""
    return int(prefix.split("layers.")[1].split(".")[0])

"""The adapted linears: where the experts sit, how they start, and that no copy goes stale."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import reference
from model.lora import LinearGroup, LoRAConfig
from model.unimoer import ModelConfig, UniMoER

CONFIG = LoRAConfig(("embedding", "reranking", "shared"), (5, 3, 1), (10.0, 3.0, 2.0))
SCALES = [2.0, 1.0, 2.0]
OUTS = {"q_proj": 12, "k_proj": 6, "v_proj": 6}
FEATURES = 10


def make_group(
    config: LoRAConfig | None = CONFIG,
    outs: dict[str, int] | None = None,
    dtype: torch.dtype = torch.float64,
) -> LinearGroup:
    """With random W and B: a group that does something."""
    torch.manual_seed(0)
    group = LinearGroup(FEATURES, outs or OUTS, config, dtype)
    with torch.no_grad():
        for name in group.outs:
            group.weight(name).normal_()
        for b in group.lora_B.values():
            b.normal_()
    return group


def gates_of(group: LinearGroup, weights: Tensor) -> Tensor:
    """(N, E) expert weights -> (N, R) w_i s_i repeated over the ranks."""
    scaled = (weights * torch.tensor(SCALES)).to(next(iter(group.lora_A.values())).dtype)
    return scaled.repeat_interleave(torch.tensor(CONFIG.ranks), 1)


def explicit(group: LinearGroup, x: Tensor, weights: Tensor) -> list[Tensor]:
    """The formula over the masters as they are now, one linear after the other."""
    outputs = []
    for name in group.outs:
        experts = []
        if name in group.adapted_names:
            for part in CONFIG.slices().values():
                a, b = group.lora_A[name], group.lora_B[name]
                experts.append((a[part].to(x.dtype), b[:, part].to(x.dtype)))
        scales = SCALES[: len(experts)]
        outputs.append(reference.moe_lora(x, group.weight(name), weights, experts, scales))
    return outputs


def inputs(tokens: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, FEATURES, generator=generator, dtype=torch.float64)
    return x, torch.rand(tokens, 3, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("outs", [OUTS, {"gate_proj": 9, "up_proj": 9}, {"o_proj": 4}])
@pytest.mark.parametrize("targets", [None, ("k_proj", "up_proj", "o_proj"), ("q_proj", "v_proj")])
def test_group_is_the_formula(outs: dict[str, int], targets: tuple[str, ...] | None) -> None:
    """In the order in which the linears were named, also where some or all have no experts."""
    config = replace(CONFIG, targets=targets) if targets else CONFIG
    group = make_group(config, outs)
    assert group.adapted_names == [n for n in outs if not targets or n in targets]
    x, weights = inputs()
    for found, expected in zip(
        group(x, gates_of(group, weights) if group.adapted_names else weights),
        explicit(group, x, weights),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def test_no_gates_is_the_base_alone() -> None:
    group = make_group()
    x, _ = inputs()
    for found, name in zip(group(x, None), OUTS, strict=True):
        torch.testing.assert_close(found, x @ group.weight(name).t())


def test_start() -> None:
    """A uniform in +-1/sqrt(D), B zero, and the same generator gives the same A."""
    wide = LinearGroup(400, {"o_proj": 8}, CONFIG, torch.bfloat16)
    wide.reset_parameters(torch.Generator().manual_seed(3))
    a, b = wide.lora_A["o_proj"], wide.lora_B["o_proj"]
    assert a.dtype == b.dtype == torch.float32, "masters stay fp32 beside a bf16 base"
    assert b.count_nonzero() == 0
    assert 0.99 / 20 < a.abs().max() < 1 / 20
    assert a.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.05)
    before = a.clone()
    wide.reset_parameters(torch.Generator().manual_seed(3))
    assert torch.equal(a, before)
    wide.reset_parameters(torch.Generator().manual_seed(4))
    assert not torch.equal(a, before)


def test_only_the_masters_are_trained() -> None:
    group = make_group()
    names = {name for name, p in group.named_parameters() if p.requires_grad}
    assert names == {f"lora_{ab}.{name}" for ab in "AB" for name in OUTS}
    assert set(group.state_dict()) == names, "the frozen base is not saved again"


# Changes of the masters after the first forward ----------------------------------------------


def step_with(optimizer: Callable) -> Callable[[LinearGroup], LinearGroup]:
    def change(group: LinearGroup) -> LinearGroup:
        stepper = optimizer(group.parameters())
        x, weights = inputs()
        torch.cat(group(x, gates_of(group, weights)), 1).square().sum().backward()
        stepper.step()
        return group

    return change


def in_place(group: LinearGroup) -> LinearGroup:
    with torch.no_grad():
        group.lora_B["k_proj"].add_(1.0)
    return group


def loaded(group: LinearGroup) -> LinearGroup:
    group.load_state_dict({name: t + 1 for name, t in group.state_dict().items()})
    return group


def assigned(group: LinearGroup) -> LinearGroup:
    state = {name: t + 1 for name, t in group.state_dict().items()}
    group.load_state_dict(state, assign=True)
    return group


def replaced(group: LinearGroup) -> LinearGroup:
    group.lora_A["q_proj"] = torch.nn.Parameter(group.lora_A["q_proj"].detach() + 1)
    return group


def reset(group: LinearGroup) -> LinearGroup:
    group.reset_parameters(torch.Generator().manual_seed(9))
    return group


def copied_and_changed(group: LinearGroup) -> LinearGroup:
    other = copy.deepcopy(group)
    with torch.no_grad():
        group.lora_A["q_proj"].zero_()  # must not reach the copy
    return in_place(other)


def moved(group: LinearGroup) -> LinearGroup:
    """To another dtype and back, changed on the way: what `.to(device)` does to the tensors."""
    return in_place(group.float()).double()


CHANGES = {
    "AdamW": step_with(lambda p: torch.optim.AdamW(p, lr=0.1)),
    "fused AdamW": step_with(lambda p: torch.optim.AdamW(p, lr=0.1, fused=True)),
    "one tensor at a time": step_with(lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False)),
    "in place": in_place,
    "load_state_dict": loaded,
    "load_state_dict(assign)": assigned,
    "another Parameter": replaced,
    "reset_parameters": reset,
    "deepcopy": copied_and_changed,
    "moved": moved,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_master_is_seen_at_once(name: str) -> None:
    group = make_group()
    x, weights = inputs()
    gates = gates_of(group, weights)
    before = torch.cat(group(x, gates), 1).detach()
    group = CHANGES[name](group)
    found, expected = torch.cat(group(x, gates), 1), torch.cat(explicit(group, x, weights), 1)
    # float32 on the way, in "moved", rounds W as well as the masters
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (found - before).abs().max() > 1e-3


def test_without_gradients_a_write_through_data_is_seen() -> None:
    """`.data` raises no version: merged or reverted experts must not be ignored."""
    group = make_group()
    x, weights = inputs()
    gates = gates_of(group, weights)
    with torch.no_grad():
        group(x, gates)
        for master in group.lora_B.values():
            master.data.zero_()
        torch.testing.assert_close(torch.cat(group(x, gates), 1), torch.cat(group(x, None), 1))


def test_a_group_made_in_inference_mode_works() -> None:
    with torch.inference_mode():
        group = make_group()
        x, weights = inputs()
        found = torch.cat(group(x, gates_of(group, weights)), 1)
        expected = torch.cat(explicit(group, x, weights), 1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_backward_uses_the_masters_of_its_forward_or_refuses() -> None:
    """A step between forward and backward would mix two models: autograd notices."""
    group = make_group()
    x, weights = inputs()
    gates = gates_of(group, weights)
    old = torch.cat(group(x.requires_grad_(), gates), 1).sum()
    in_place(group)
    group(x, gates)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.backward()


def test_forward_between_two_backwards_is_no_change() -> None:
    """Waiting graphs stay valid while nothing has written to the masters."""
    group = make_group()
    x, weights = inputs()
    gates = gates_of(group, weights)
    first, second = (torch.cat(group(x, gates), 1).sum() for _ in range(2))
    first.backward()
    once = group.lora_A["q_proj"].grad.clone()
    group(x, gates)
    second.backward()
    torch.testing.assert_close(group.lora_A["q_proj"].grad, 2 * once)


def test_dropout_acts_in_training_alone() -> None:
    group = make_group(replace(CONFIG, dropout=0.5))
    x, weights = inputs()
    gates = gates_of(group, weights)
    expected = torch.cat(explicit(group, x, weights), 1)
    group.eval()
    torch.testing.assert_close(torch.cat(group(x, gates), 1), expected)
    group.train()
    torch.manual_seed(0)
    assert (torch.cat(group(x, gates), 1) - expected).abs().max() > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": (1, 2)}, "same number of experts"),
        ({"alphas": (1.0,)}, "same number of experts"),
        ({"experts": (), "ranks": (), "alphas": ()}, "at least one"),
        ({"experts": ("a", "b", "a")}, "names must differ"),
        ({"ranks": (4, 0, 2)}, "rank must be at least 1"),
        ({"targets": ("q_proj", "query")}, "unknown \\['query'\\]"),
        ({"targets": ()}, "targets is empty"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
    ],
)
def test_bad_configs(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_slices_follow_the_ranks() -> None:
    assert CONFIG.total_rank == 9
    assert CONFIG.slices() == {
        "embedding": slice(0, 5),
        "reranking": slice(5, 8),
        "shared": slice(8, 9),
    }


def test_many_texts_renew_the_borders_once(tiny_base: Path, monkeypatch) -> None:
    """However many batches; a write that raises the version, such as an optimizer's, is seen."""
    lora = LoRAConfig(("a",), (2,), (4.0,))
    model = UniMoER(ModelConfig(base=str(tiny_base), lora=lora)).train()
    copied, texts = [], ["one", "two words", "and three more"]
    borders = LinearGroup.borders
    monkeypatch.setattr(LinearGroup, "borders", lambda self: copied.append(1) or borders(self))
    options = {"budget": 1, "progress": False}  # a batch for each text
    before = model.encode_document(texts, **options)
    groups = sum(isinstance(m, LinearGroup) and bool(m.adapted_names) for m in model.modules())
    assert len(copied) == groups and model.training
    with torch.no_grad():
        for parameter in model.trained().values():
            parameter.add_(0.1)
    assert (model.encode_document(texts, **options) - before).abs().max() > 1e-3

"""The router: weights of each kind, what acts in training alone, and rows that stay apart."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.sparsegen import sparsegen
from model.router import NOT_LEARNED, ROUTES, SIMILARITY, TASKS, Router, RouterConfig

EXPERTS = ("embedding", "reranking", "shared")
FEATURES = 12
KINDS = sorted(set(ROUTES) - set(SIMILARITY))  # those need pilots: tests/model/test_routes.py


def make_router(config: RouterConfig, experts: tuple[str, ...] = EXPERTS) -> Router:
    """In evaluation, and with logits large enough that texts differ."""
    torch.manual_seed(0)
    router = Router(FEATURES, experts, config).eval()
    if config.kind not in NOT_LEARNED:
        with torch.no_grad():
            router.down.weight.mul_(200)
    return router


def pooled(texts: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tasks = torch.arange(texts) % len(TASKS)
    return torch.randn(texts, FEATURES, generator=generator), tasks


@pytest.mark.parametrize(
    ("kind", "always_on"),
    [(kind, name) for kind in KINDS for name in ("", "shared")]
    # in the middle of the experts, which routing by task cannot do without
    + [(kind, "reranking") for kind in KINDS if kind != "task"],
)
def test_weights_lie_on_the_simplex(kind: str, always_on: str) -> None:
    router = make_router(RouterConfig(kind, always_on=always_on))
    weights = router(*pooled())
    assert weights.shape == (6, 3) and weights.dtype == torch.float32
    if always_on:
        at = EXPERTS.index(always_on)
        assert (weights[:, at] == 1).all()
        weights = weights[:, [i for i in range(3) if i != at]]
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(6))
    assert (weights.std(0) > 1e-3).any() == (kind != "uniform"), "texts must differ, or not"


def test_task() -> None:
    """By name, not by place: the experts may stand in any order."""
    router = make_router(RouterConfig("task"), ("shared", "reranking", "embedding"))
    x, _ = pooled(3)
    weights = router(x, torch.tensor([TASKS.index(t) for t in ("embedding", "reranking")] + [0]))
    assert weights.tolist() == [[0, 0, 1], [0, 1, 0], [0, 0, 1]]


def test_uniform() -> None:
    assert make_router(RouterConfig("uniform"))(*pooled()).unique().tolist() == [
        pytest.approx(1 / 3)
    ]
    with_shared = make_router(RouterConfig("uniform", always_on="shared"))(*pooled())
    torch.testing.assert_close(with_shared[0], torch.tensor([0.5, 0.5, 1.0]))


def test_softmax_and_sparsegen_are_those_of_the_logits() -> None:
    x, tasks = pooled()
    soft = make_router(RouterConfig("softmax"))
    torch.testing.assert_close(soft(x, tasks), soft.logits(x).softmax(-1))
    sparse = make_router(RouterConfig("sparsegen"))
    with torch.no_grad():
        sparse.v.fill_(-1.0)
    assert sparse.c.item() == pytest.approx(0.1 + 0.31326169)  # softplus(-1) = ln(1 + 1/e)
    torch.testing.assert_close(sparse(x, tasks), sparsegen(sparse.logits(x), sparse.c))
    assert (sparse(x, tasks) == 0).any()


def test_logits_by_hand() -> None:
    """down(silu(up(x / rms(x)))): the scale of the pooled state does not matter."""
    router = make_router(RouterConfig())
    x, _ = pooled()
    normed = x / x.square().mean(-1, keepdim=True).sqrt()
    inner = normed @ router.up.weight.t() + router.up.bias
    inner = inner * inner.sigmoid()
    expected = inner @ router.down.weight.t() + router.down.bias
    torch.testing.assert_close(router.logits(x), expected)
    torch.testing.assert_close(router.logits(1000 * x), expected, rtol=1e-4, atol=1e-4)


def test_sparsegen_starts_dense_with_gradients_everywhere() -> None:
    torch.manual_seed(0)
    router = Router(FEATURES, EXPERTS, RouterConfig())
    assert router.c.item() == pytest.approx(2.0)
    weights = router(*pooled())
    assert weights.min() > 0.2
    (weights * torch.randn(6, 3)).sum().backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_reset_undoes_training() -> None:
    """The same generator gives the same router, Sparsegen's c included."""
    router = Router(FEATURES, EXPERTS, RouterConfig())
    router.reset_parameters(torch.Generator().manual_seed(5))
    start = {name: p.detach().clone() for name, p in router.named_parameters()}
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.add_(1.0)
    router.reset_parameters(torch.Generator().manual_seed(5))
    for name, parameter in router.named_parameters():
        assert torch.equal(parameter, start[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_is_routed_alone(kind: str) -> None:
    """Whatever else is in the batch, and in whatever order."""
    router = make_router(RouterConfig(kind)).double()
    x, tasks = pooled()
    x = x.double()
    together = router(x, tasks)
    for i in range(len(x)):
        torch.testing.assert_close(router(x[i : i + 1], tasks[i : i + 1]), together[i : i + 1])
    torch.testing.assert_close(router(x.flip(0), tasks.flip(0)), together.flip(0))


# What acts in training alone -----------------------------------------------------------------

TRAINING = {
    "noise": RouterConfig("softmax", noise=1.0),
    "dropout": RouterConfig("softmax", expert_dropout=0.5),
    "prior": RouterConfig("softmax", task_prior=3.0),
}


@pytest.mark.parametrize("what", TRAINING)
def test_evaluation_is_undisturbed(what: str) -> None:
    router = make_router(TRAINING[what])
    x, tasks = pooled()
    expected = router.logits(x).softmax(-1)
    torch.manual_seed(0)
    assert torch.equal(router(x, tasks), expected)
    router.train()
    assert (router(x, tasks) - expected).abs().max() > 0.01


@pytest.mark.parametrize("what", ["noise", "prior"])
def test_annealed_to_nothing(what: str) -> None:
    router = make_router(TRAINING[what]).train()
    x, tasks = pooled()
    router.anneal = 0.0
    torch.testing.assert_close(router(x, tasks), router.logits(x).softmax(-1))


def test_noise_has_the_deviation_that_was_asked_for() -> None:
    router = make_router(RouterConfig("softmax", noise=0.3)).train()
    router.anneal = 0.5
    x = pooled(1)[0].expand(4000, -1)
    torch.manual_seed(0)
    weights = router(x, torch.zeros(4000, dtype=torch.int64))
    noise = weights.log() - router.logits(x)
    # Softmax forgets what is common to a row, so look at differences: their variance doubles.
    difference = noise[:, 0] - noise[:, 1]
    assert difference.std().item() == pytest.approx(0.3 * 0.5 * 2**0.5, rel=0.05)
    assert abs(difference.mean().item()) < 0.02


def test_prior_by_hand() -> None:
    router = make_router(RouterConfig("softmax", task_prior=3.0)).train()
    router.anneal = 0.5
    x, tasks = pooled(2)
    logits = router.logits(x) + torch.tensor([[1.5, 0, 0], [0, 1.5, 0]])
    torch.testing.assert_close(router(x, tasks), logits.softmax(-1))


def test_expert_dropout_renormalises() -> None:
    router = make_router(RouterConfig("uniform", expert_dropout=0.4, always_on="shared")).train()
    torch.manual_seed(0)
    weights = router(torch.zeros(5000, FEATURES), torch.zeros(5000, dtype=torch.int64))
    assert (weights[:, 2] == 1).all(), "the always-on expert is never dropped"
    routed = weights[:, :2]
    torch.testing.assert_close(routed.sum(1), torch.ones(5000))
    # Both kept (0.36) or both dropped (0.16, then the text keeps its weights): one half each.
    both = (routed == 0.5).all(1).float().mean().item()
    assert both == pytest.approx(0.52, abs=0.03)


def test_dropping_the_only_expert_keeps_it() -> None:
    router = make_router(RouterConfig("task", expert_dropout=0.9)).train()
    torch.manual_seed(0)
    weights = router(torch.zeros(200, FEATURES), torch.zeros(200, dtype=torch.int64))
    assert torch.equal(weights, torch.tensor([1.0, 0.0, 0.0]).expand(200, 3))


# Configs that cannot work --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "sigmoid"}, "'sigmoid'"),
        ({"expert_dropout": 1.0}, "expert_dropout"),
        ({"expert_dropout": -0.1}, "expert_dropout"),
        ({"noise": -1.0}, "noise"),
        ({"hidden": 0}, r"hidden must lie in \[1, 256\]"),
        ({"hidden": 512}, "got 512"),
    ],
)
def test_bad_configs(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(RouterConfig(), **change)


@pytest.mark.parametrize(
    ("config", "experts", "message"),
    [
        (RouterConfig(always_on="common"), EXPERTS, "always_on 'common'"),
        (RouterConfig("task"), ("a", "b"), "routing by task"),
        (RouterConfig("task", always_on="reranking"), EXPERTS, "reranking"),
        (RouterConfig(task_prior=1.0), ("embedding", "other"), "reranking"),
        (RouterConfig(always_on="shared"), ("shared",), "routed"),
    ],
)
def test_bad_routers(config: RouterConfig, experts: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Router(FEATURES, experts, config)

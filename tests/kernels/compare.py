"""How a kernel is held against its plain twin: both against float64, outputs and every gradient."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from kernels.choice import interpreted

# What a kernel may err beyond 1.5 times the plain formula at the same dtype, relative
FLOOR = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}
# A gradient of few numbers is few samples of rounding and no mean over many: on one processor the
# plain formula hits it to the last bit, on another it does not. Up to so many -> times more.
FEW = {1: 10.0, 16: 3.0, 1024: 1.25}

# Where and in which dtype kernels run: in the interpreter (it is wrong for bfloat16), or on a card
PLACES = [
    pytest.param("cpu", torch.float32, id="interpreter-fp32"),
    pytest.param("cpu", torch.float16, id="interpreter-fp16"),
    pytest.param("cuda", torch.float32, id="card-fp32", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float16, id="card-fp16", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, id="card-bf16", marks=pytest.mark.gpu),
]
places = pytest.mark.parametrize(("device", "dtype"), PLACES)

# Texts of T tokens: T in {0, 1, 17, 100, 513}, a text of one token in each
TEXTS = [(), (1,), (1, 16), (33, 1, 66), (1, 17, 395, 100)]
texts = pytest.mark.parametrize("sizes", TEXTS, ids=lambda sizes: f"T{sum(sizes)}")


def undefined_memory_is_nan(request: pytest.FixtureRequest) -> Iterator[None]:
    """What nobody wrote must not be read. The body of a fixture."""
    case = getattr(request.node, "callspec", None)
    device = case.params.get("device", "cpu") if case else "cpu"
    if device == "cpu" and not interpreted():
        pytest.skip("the interpreter is off: set TRITON_INTERPRET=1")
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all() and torch.zeros(3).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(found: Tensor, truth: Tensor) -> float:
    """RMS of the difference over the RMS of the truth; of the difference where the truth is 0."""
    if truth.numel() == 0:
        return 0.0
    difference, size = found.detach().double().cpu() - truth, truth.norm()
    return (difference.norm() / (size if size > 0 else truth.numel() ** 0.5)).item()


class Inputs:
    """Named float64 tensors, some kept wide (fp32) in a 16-bit run, some without gradients."""

    def __init__(self, **tensors: Tensor):
        self.tensors, self.wide, self.frozen = tensors, set(), set()

    def keep_wide(self, *names: str) -> "Inputs":
        self.wide |= set(names)
        return self

    def freeze(self, *names: str) -> "Inputs":
        self.frozen |= set(names)
        return self

    def cast(self, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        made = {}
        for name, value in self.tensors.items():
            if value.is_floating_point():
                own = torch.float32 if name in self.wide and dtype != torch.float64 else dtype
                made[name] = value.to(device, own).detach()
                made[name].requires_grad_(name not in self.frozen)
            else:
                made[name] = value.to(device)
        return made


Run = Callable[[dict[str, Tensor]], list[Tensor]]


def results(run: Run, values: dict[str, Tensor]) -> list[Tensor]:
    """Outputs, then the gradients of every input that has one, for fixed random cotangents."""
    outputs = run(values)
    generator = torch.Generator().manual_seed(7)
    total = torch.zeros((), dtype=torch.float64)
    for y in outputs:
        g = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        total = total + (y * g.to(y.device, y.dtype)).double().sum().cpu()
    wanted = [v for v in values.values() if v.requires_grad]
    gradients = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
    return [*outputs, *gradients]


def check(fused: Run, plain: Run, inputs: Inputs, device: str, dtype: torch.dtype) -> None:
    """Both runs take the inputs by name and return the same outputs."""
    truth = results(plain, inputs.cast("cpu", torch.float64))
    same = results(plain, inputs.cast(device, dtype))
    found = results(fused, inputs.cast(device, dtype))
    outputs = len(truth) - sum(n not in inputs.frozen for n in inputs.tensors)
    names = [f"output {i}" for i in range(outputs)]
    names += [f"d {name}" for name in inputs.tensors if name not in inputs.frozen]
    for name, a, b, c in zip(names, found, same, truth, strict=True):
        assert a.shape == c.shape, name
        few = next((more for most, more in FEW.items() if c.numel() <= most), 1.0)
        limit = few * (1.5 * error(b, c) + FLOOR[dtype])
        assert error(a, c) <= limit, f"{name}: {error(a, c):.2e}, allowed {limit:.2e}"

"""Every kernel as it would be launched on a card that is not here: compiled, and what it takes.

    python -m bench.compiled            all shapes and cards, into bench/results/kernels.md
    python -m bench.compiled --quick    one shape for each card, printed alone

A layer of the real shape runs forward and backward with launches recorded instead of made, so what
is compiled is what the model launches. Then Triton compiles it for sm_75, sm_80 and sm_90, and the
tools that come with it say what the machine code uses. Fails when a kernel spills, wants more
shared memory than a block may have, or does its matrix products without matrix instructions.
"""

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from analysis.figures import table
from bench.designs import lora_config
from bench.shapes import SHAPES
from kernels.sparsegen import fused_sparsegen
from model.config import DecoderConfig
from model.files import write_text
from model.packed import pack
from model.router import RouterConfig
from model.transformer import Decoder

RESULT = Path(__file__).parent / "results" / "kernels.md"
LENGTHS = (1, 15)  # the number of tokens is no part of a kernel
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Card:
    """A target: the most shared memory a block may ask for (CUDA C Programming Guide, table of
    technical specifications), the dtype that runs there, whether Triton has matrix units there."""

    name: str
    capability: int
    shared: int
    dtype: torch.dtype
    matrix_units: bool


CARDS = (
    Card("T4", 75, 64 * 1024, torch.float16, False),
    Card("A100", 80, 163 * 1024, torch.bfloat16, True),
    Card("H100", 90, 227 * 1024, torch.bfloat16, True),
)
QUICK = ("qwen3-0.6b", 16)


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel and what identifies its machine code."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    aligned: tuple[str, ...]  # arguments divisible by 16
    warps: int
    stages: int


@dataclass(frozen=True)
class Code:
    """What the machine code of a kernel takes: registers of a thread, bytes of local memory (what
    spills go to) and of shared memory, and its matrix instructions."""

    registers: int
    local: int
    shared: int
    matrix: int
    dots: bool


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect launches instead of making them. What the kernels would write stays undefined."""
    launches: list[Launch] = []

    def run(self: JITFunction, *args, grid, warmup, num_warps=4, num_stages=3, **kwargs) -> None:
        launches.append(_launch(self, args, kwargs, num_warps, num_stages))

    with mock.patch.object(JITFunction, "run", run):
        yield launches


def _launch(kernel: JITFunction, args: tuple, kwargs: dict, warps: int, stages: int) -> Launch:
    """Specialised as Triton does it: None and 1 are constants, addresses and numbers that 16
    divides are marked."""
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    signature, constants, aligned = {}, {}, []
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            # Memory on a card starts at multiples of 256; a view starts where its offset says.
            if value.storage_offset() * value.element_size() % 16 == 0:
                aligned.append(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                aligned.append(name)
    return Launch(
        kernel, tuple(signature.items()), tuple(constants.items()), tuple(aligned), warps, stages
    )


def launches(shape: DecoderConfig, rank: int, card: Card) -> list[Launch]:
    """What one layer launches, forward and backward, without a router, routed by text and by token;
    each once."""
    shape = replace(shape, num_hidden_layers=1, vocab_size=16)
    lora = lora_config((rank,) * 3)
    batch = pack([[1] * length for length in LENGTHS])
    with (
        recording() as found,
        mock.patch("model.lora.has_matrix_units", lambda device: card.matrix_units),
        mock.patch("kernels.route.has_matrix_units", lambda device: card.matrix_units),
    ):
        for router in (None, RouterConfig(), RouterConfig(per_token=True)):
            model = Decoder(shape, lora, router, card.dtype, fused=True).train()
            hidden, routing = model(batch)
            (hidden.float().sum() + sum(weights.sum() for weights in routing)).backward()
            with torch.no_grad():
                model(batch)
        logits = torch.zeros(64, 3, requires_grad=True)
        fused_sparsegen(logits, torch.ones((), requires_grad=True)).sum().backward()
    return list(dict.fromkeys(found))


def compiled(launch: Launch, card: Card) -> Code:
    """Compile one launch for a card and read its machine code."""
    kernel = launch.kernel
    at = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        dict(launch.signature),
        {at[name]: value for name, value in launch.constants},
        {at[name]: [["tt.divisibility", 16]] for name in launch.aligned},
    )
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    made = triton.compile(source, target=GPUTarget("cuda", card.capability, 32), options=options)
    usage = _tool("cuobjdump", "--dump-resource-usage", made.asm["cubin"])
    fields = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
    ptx = made.asm["ptx"]
    return Code(
        registers=fields["REG"],
        local=fields["STACK"] + fields["LOCAL"],
        shared=made.metadata.shared,
        matrix=len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)", ptx)),
        dots="tt.dot" in made.asm["ttir"],
    )


def _tool(name: str, option: str, cubin: bytes) -> str:
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [str(folder / name), option, file.name], capture_output=True, text=True, check=True
        )
    return done.stdout


def problems(code: Code, card: Card) -> list[str]:
    """What a kernel may not do on a card."""
    found = []
    if code.local:
        found.append(f"spills {code.local} bytes")
    if code.shared > card.shared:
        found.append(f"wants {code.shared} bytes of shared memory, a block has {card.shared}")
    if code.dots and card.matrix_units and not code.matrix:
        found.append("has matrix products without matrix instructions")
    return found


def measure(shapes: list[str], ranks: list[int], cards: tuple[Card, ...]) -> list[tuple[str, ...]]:
    """A row for each kernel, card and shape, over the ranks and all the ways it is launched."""
    known: dict[tuple[Launch, str], Code] = {}
    groups: dict[tuple[str, Card, str], dict[Launch, Code]] = {}
    todo = [
        (shape, card, launch)
        for shape in shapes
        for rank in ranks
        for card in cards
        for launch in launches(SHAPES[shape], rank, card)
    ]
    for shape, card, launch in tqdm(todo, desc="compile", unit="kernel", leave=False):
        key = (launch, card.name)
        if key not in known:
            known[key] = compiled(launch, card)
        where = Path(launch.kernel.fn.__code__.co_filename).stem
        name = f"{where}.{launch.kernel.__name__}"
        groups.setdefault((name, card, shape), {})[launch] = known[key]
    return [
        _row(*group, list(codes.values()))
        for group, codes in sorted(groups.items(), key=lambda item: str(item[0]))
    ]


def _row(kernel: str, card: Card, shape: str, codes: list[Code]) -> tuple[str, ...]:
    found = sorted({problem for code in codes for problem in problems(code, card)})
    registers = sorted({code.registers for code in codes})
    matrix = sorted({code.matrix for code in codes if code.dots})
    return (
        kernel, f"{card.name} (sm_{card.capability})", shape, str(len(codes)), _range(registers),
        str(max(code.local for code in codes)),
        f"{max(code.shared for code in codes) / 1024:.1f}", _range(matrix),
        "; ".join(found) or "ok",
    )  # fmt: skip


def _range(values: list[int]) -> str:
    ends = dict.fromkeys((values[0], values[-1])) if values else ()
    return " to ".join(map(str, ends)) or "-"


HEAD = (
    "kernel", "card", "shape", "ways it is launched", "registers of a thread",
    "spills (bytes)", "shared memory (KiB)", "matrix instructions", "verdict",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compiled", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    shapes = [QUICK[0]] if quick else ["qwen3-0.6b", "qwen3-4b", "mistral-7b"]
    ranks = [QUICK[1]] if quick else [16, 32]
    rows = measure(shapes, ranks, CARDS)
    bad = [row for row in rows if row[-1] != "ok"]
    text = (
        "# The kernels' machine code\n\n"
        f"By `make kernels-report`, Triton {triton.__version__}, without a card: what the model "
        "launches for one layer, forward and backward, compiled for three of them. fp16 on the T4, "
        "where GEMMs are cuBLAS's, bf16 on the others; ranks of each of three experts: "
        f"{', '.join(map(str, ranks))}. A kernel passes without spills, within the shared memory "
        "that a block may have, and with matrix instructions where it has a matrix product. (On "
        "the T4 Triton has none; the one product left there is the router's small fp32 one.)\n\n"
        f"{len(rows)} rows, {len(bad)} that fail.\n\n{table(HEAD, rows).rstrip()}\n"
    )
    print(text)
    if not quick:
        write_text(RESULT, text)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

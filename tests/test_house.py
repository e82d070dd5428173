"""The rules of the house, read off the syntax trees: who may import whom, what no file contains.

`problems` is the whole rule book for one file; it is held against snippets that break each rule,
and then against every product file.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = ("kernels", "model", "eval", "train", "analysis", "run")  # each may import those before it
LEAVES = ("trials", "scales", "experiments")  # settings and the study's table: stdlib only
LEAF_USERS = ("experiments", "eval", "train", "analysis", "run")
OUTSIDE = ("bench", "tests")  # may import anything, and nothing imports them
OURS = {*ORDER, *LEAVES, *OUTSIDE}
# mteb pulls transformers in, datasets is what it takes; wandb is the user's own, if there at all
ONLY_IN = {"mteb": "eval", "datasets": "eval", "wandb": "analysis"}
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
MODULES = {  # distribution -> module
    "pytrec_eval_terrier": "pytrec_eval",
    "faiss_cpu": "faiss",
    "pystemmer": "Stemmer",
    "scikit_learn": "sklearn",
    "umap_learn": "umap",
}
LINES = 400


def main_set() -> set[str]:
    """The modules that requirements.txt installs by name."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    names: list[str] = re.findall(r"^([A-Za-z][\w.-]*)(?:\[.*?\])?==", text, re.MULTILINE)
    names = [name.lower().replace("-", "_") for name in names]
    return {MODULES.get(name, name) for name in names}


def imports(tree: ast.AST, name: str) -> list[tuple[int, str]]:
    """(line, first component) of everything a file imports, also inside functions."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name.split(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            package = PurePosixPath(name).parts[: -node.level]
            found += [(node.lineno, (*package, node.module or "")[0])]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.lineno, (node.module or "").split(".")[0])]
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).split(".")[-1]
            first = node.args[0]
            if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
                found += [(node.lineno, str(first.value).split(".")[0])]
    return found


def may_import(house: str, module: str) -> bool:
    """Whether a file of `house` (a package, or a root file without .py) may import `module`."""
    if module in sys.stdlib_module_names and module not in OURS:
        return module not in PICKLES
    if module in LEAVES:
        return house in LEAF_USERS and house != module
    if house in LEAVES:
        return False
    if module in OURS:
        return module in ORDER[: ORDER.index(house) + 1]
    return module in main_set() or ONLY_IN.get(module) == house


def problems(name: str, source: str) -> list[str]:
    """What breaks the rules in the product file `name` (a posix path from the root)."""
    house = PurePosixPath(name).parts[0].removesuffix(".py")
    tree = ast.parse(source, name)
    found = [
        f"{name}:{line}: {house} may not import {module}"
        for line, module in imports(tree, name)
        if not may_import(house, module)
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append(f"{name}:{node.lineno}: bare except")
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            if "load" in [alias.name for alias in node.names]:
                found.append(f"{name}:{node.lineno}: write torch.load, so that this test sees it")
        if isinstance(node, ast.Call):
            keywords = {key.arg: ast.unparse(key.value) for key in node.keywords}
            if ast.unparse(node.func) == "torch.load" and keywords.get("weights_only") != "True":
                found.append(f"{name}:{node.lineno}: torch.load without weights_only=True")
            if keywords.get("allow_pickle", "False") != "False":
                found.append(f"{name}:{node.lineno}: allow_pickle")
    for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
        # Triton's compiler goes on behind an `if` whose branch returned, its interpreter does not.
        if "triton.jit" in map(ast.unparse, function.decorator_list):
            inner = [n for n in ast.walk(function) if isinstance(n, ast.Return)]
            found += [
                f"{name}:{n.lineno}: return inside a branch of a kernel"
                for n in inner if n not in function.body
            ]  # fmt: skip
    return found + two_jobs(name, source)


def two_jobs(name: str, source: str) -> list[str]:
    """What breaks the one rule that tests and benchmarks have too."""
    if (lines := len(source.splitlines())) > LINES:
        return [f"{name}: {lines} lines, more than {LINES}: it has two jobs"]
    return []


def files_in(*houses: str) -> list[Path]:
    return [file for house in houses for file in (ROOT / house).rglob("*.py")]


def product() -> list[str]:
    """Every Python file at the root or in a product package, as posix paths from the root."""
    files = [*ROOT.glob("*.py"), *files_in(*ORDER)]
    return sorted(file.relative_to(ROOT).as_posix() for file in files)


@pytest.mark.parametrize("name", product())
def test_product_file(name: str) -> None:
    assert problems(name, (ROOT / name).read_text(encoding="utf-8")) == []


def test_tests_and_benchmarks_have_one_job_a_file() -> None:
    files = files_in(*OUTSIDE)
    assert len(files) > 100
    assert [p for f in files for p in two_jobs(str(f), f.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("kernels/a.py", "from model.lora import f"),
        ("kernels/a.py", "import experiments"),
        ("model/a.py", "def f():\n    import eval.metrics"),
        ("model/a.py", "from . import b\nfrom ..train import c"),
        ("model/a.py", "import importlib\nimportlib.import_module('run')"),
        ("model/a.py", "import experiments"),
        ("train/a.py", "import analysis.report"),
        ("analysis/a.py", "import run"),
        ("analysis/deep/a.py", "from bench.timing import median"),
        ("run.py", "import tests.helpers"),
        ("run.py", "import transformers"),
        ("model/a.py", "from peft import LoraConfig"),
        ("eval/a.py", "import sentence_transformers"),
        ("model/a.py", "import mteb"),
        ("model/a.py", "import entmax"),
        ("train/a.py", "from wandb import init"),
        ("experiments.py", "import numpy"),
        ("trials.py", "import experiments"),
        ("kernels/a.py", "from trials import Config"),
        ("experiments.py", "import model.lora"),
        ("train/a.py", "import pickle"),
        ("train/a.py", "torch.load('x')"),
        ("train/a.py", "torch.load('x', weights_only=False)"),
        ("train/a.py", "from torch import load"),
        ("train/a.py", "np.load('x', allow_pickle=True)"),
        ("train/a.py", "try:\n    f()\nexcept:\n    pass"),
        ("train/a.py", "\n" * (LINES + 1)),
        ("kernels/a.py", "@triton.jit\ndef f(x, M):\n    if M:\n        return x\n    return -x"),
    ],
)
def test_rules_catch(name: str, source: str) -> None:
    assert len(problems(name, source)) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("kernels/a.py", "import torch\nimport triton\nfrom kernels import reference"),
        ("model/a.py", "from .lora import f\nfrom kernels.reference import g\nimport collections"),
        ("model/a.py", "from model import lora\nfrom importlib import metadata"),
        ("eval/a.py", "import mteb\nimport Stemmer\nimport pytrec_eval"),
        ("analysis/a.py", "import experiments\nimport train.loop\nimport matplotlib.pyplot as plt"),
        ("run.py", "import experiments\nimport analysis.report\nimport kernels"),
        ("experiments.py", "import dataclasses\nfrom typing import Any\nfrom trials import Config"),
        ("train/a.py", "torch.load('x', weights_only=True)\nnp.load('x')\njson.load(file)"),
        ("train/a.py", "try:\n    f()\nexcept OSError:\n    raise"),
        ("train/a.py", "\n" * LINES),
        ("kernels/a.py", "@triton.jit\ndef f(x):\n    return x"),
        ("kernels/a.py", "def f(x, M):\n    if M:\n        return x\n    return -x"),
    ],
)
def test_rules_allow(name: str, source: str) -> None:
    assert problems(name, source) == []


def test_every_module_has_its_place() -> None:
    ignored = {"build", "runs", "results", "docs"}
    houses = {
        path.relative_to(ROOT).parts[0].removesuffix(".py")
        for pattern in ("*.py", "*/*.py")
        for path in ROOT.glob(pattern)
        if not path.relative_to(ROOT).parts[0].startswith(".")
    }
    assert houses - ignored <= OURS, "a new folder or root file needs its place in ORDER"
    packages = {house for house in ORDER if house != "run"}
    assert packages <= {name.split("/")[0] for name in product()}


def test_kernels_init_is_empty() -> None:
    assert (ROOT / "kernels" / "__init__.py").read_bytes() == b""


def test_transformers_imports_beside_our_kernels() -> None:
    """`kernels` is also a Hugging Face distribution, for which transformers looks."""
    code = (
        "import kernels, peft, transformers\n"
        "transformers.LlamaForCausalLM, transformers.Qwen3ForCausalLM, peft.LoraConfig\n"
        "print(kernels.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "kernels" / "__init__.py"


def make_targets() -> dict[str, str]:
    """Target -> its help line ('' without one), for the Makefile's named targets."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = re.findall(r"^([a-z][a-z-]*):(?!=)[^#\n]*(?:## (.*))?$", text, re.MULTILINE)
    return dict(found)


def test_every_target_has_a_help_line() -> None:
    targets = make_targets()
    assert {"kill-gate", "test", "test-gpu", "lint", "report"} <= targets.keys()
    assert [name for name, text in targets.items() if not text] == []
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", text.replace("\\\n", ""), re.MULTILINE)
    assert phony and set(phony[1].split()) == targets.keys()


def mentioned_targets(markdown: str) -> set[str]:
    """The targets of all `make target` in code blocks and code spans."""
    code = re.findall(r"```.*?```|`[^`\n]+`", markdown, re.DOTALL)
    pattern = r"(?<![\w-])make((?: +[A-Z_]+=\S*)*) +([a-z][a-z-]*)"
    return {match[1] for text in code for match in re.findall(pattern, text)}


def test_docs_name_only_targets_that_exist() -> None:
    sample = "make sure `PYTHON=p make a-b` and\n```\n$ make TORCH=cpu c SCALE=small  # make d\n```"
    assert mentioned_targets(sample) == {"a-b", "c", "d"}
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        assert mentioned_targets(page.read_text(encoding="utf-8")) <= make_targets().keys(), page


def made(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What make would run."""
    command, env = ["make", "-n", "PYTHON=python", *arguments], {"PATH": os.environ["PATH"]}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on PATH")
def test_processes_are_started_or_refused() -> None:
    torchrun = "python -m torch.distributed.run --standalone --nproc-per-node 2 -m "
    for words, command in (
        (["kill-gate"], "run run kill_gate"),
        (["eval", "BENCH=beir"], "eval beir"),
        (["baselines"], "eval baselines"),
        (["encode"], "eval encode"),
    ):
        assert torchrun + command in made(*words, "PROCESSES=2").stdout
        assert f"python -m {command}" in made(*words).stdout
    for name, *words in (["mine"], ["search"], ["rag"], ["mteb", "eval", "BENCH=mteb"]):
        words = words or [name]
        refused = made(*words, "PROCESSES=2")
        assert refused.returncode and len(refused.stderr.splitlines()) == 1
        assert f"{name}: the work of one process" in refused.stderr
        assert made(*words).returncode == 0


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on PATH")
def test_variables_reach_run_only_when_given() -> None:
    def shown(*arguments: str) -> list[str]:
        done = made("kill-gate", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().splitlines()

    assert shown()[-1] == "python -m run run kill_gate"
    given = shown(
        "SCALE=smoke", "BASE=x/y", "DATA=a b", "SEEDS=1", "ARMS=rank", "CONTROLS=1", "AA=1",
        "WANDB=gate", "EVALUATE=c d", "MTEB='e f' g", "ARGS=--set steps=2",
    )  # fmt: skip
    assert given == [
        "python -m model.bases 'x/y'",
        "python -m run run kill_gate --scale smoke --base 'x/y' --data 'a b'"
        " --seeds 1 --arms rank --controls --aa --wandb 'gate'"
        " --evaluate c d --mteb 'e f' g --set steps=2",
    ]

"""What a card alone can show, in steps: kept, resumed, told apart; without a card it says so."""

import importlib.util
import json
import sys

import pytest
import torch

from bench import gpu_all
from bench.gpu_all import Step


def python(code: str, minutes: float = 1) -> Step:
    name = code.split("#")[-1].strip()
    return Step(name, f"shows {name}", [sys.executable, "-c", code], minutes)


def test_without_a_card(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_all.main([]) == 0
    assert "skipped, torch sees no CUDA device" in capsys.readouterr().out


def test_steps(monkeypatch, tmp_path) -> None:
    marker = tmp_path / "times"
    listed = [
        python(f"open({str(marker)!r}, 'a').write('x'); print('fine')  # good"),
        python("import sys; print('broken'); sys.exit(3)  # bad"),
        python("import time; print('begun', flush=True); time.sleep(60)  # long", 0.02),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_all, "device_name", lambda device: "NVIDIA Test 1")
    monkeypatch.setattr(gpu_all, "steps", lambda python: listed)
    monkeypatch.setattr(gpu_all, "RESULTS", tmp_path / "results")
    for _ in range(2):
        assert gpu_all.main(["--runs", str(tmp_path / "runs")]) == 1
    assert marker.read_text() == "x"  # done is done
    text = (tmp_path / "results" / "nvidia-test-1-summary.md").read_text()
    assert text.startswith("# NVIDIA Test 1\n")
    assert "| good | shows good | done |" in text and "fine" in text
    assert "| bad | shows bad | failed with exit code 3 |" in text and "broken" in text
    assert "| long | shows long | stopped at its limit, goes on in the next call |" in text
    state = json.loads((tmp_path / "runs" / "nvidia-test-1.json").read_text())
    assert state["good"]["tail"] == ["fine"] and state["long"]["tail"] == ["begun"]
    gpu_all.main(["--runs", str(tmp_path / "runs"), "--only", "good"])
    assert marker.read_text() == "xx"


@pytest.mark.parametrize("step", gpu_all.steps(sys.executable), ids=lambda step: step.name)
def test_every_step_is_short_and_exists(step: Step) -> None:
    assert step.minutes < 8
    python, flag, module, *_ = step.command
    assert (python, flag) == (sys.executable, "-m") and importlib.util.find_spec(module)

"""What a card alone can show, in steps: kept, resumed, told apart; without a card it says so."""

import importlib.util
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

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
    measured = tmp_path / "record.json"
    measured.write_text('{"left_out": ["ops"]}')
    listed = [
        python(f"open({str(marker)!r}, 'a').write('x'); print('fine')  # good"),
        python("import sys; print('broken'); sys.exit(3)  # bad"),
        python("import time; print('begun', flush=True); time.sleep(60)  # long", 0.02),
        replace(python(f"open({str(marker)!r}, 'a').write('y')  # partly"), record=measured),
        replace(python("print('begun')  # later"), after="partly"),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_all, "device_name", lambda device: "NVIDIA Test 1")
    card = SimpleNamespace(total_memory=80e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda at: card)
    monkeypatch.setattr(gpu_all, "steps", lambda python, device, memory: listed)
    monkeypatch.setattr(gpu_all, "RESULTS", tmp_path / "results")
    for _ in range(2):
        assert gpu_all.main(["--runs", str(tmp_path / "runs")]) == 1
    assert marker.read_text() == "xyy"  # done is done; what measured a part goes on
    text = (tmp_path / "results" / "nvidia-test-1-summary.md").read_text()
    assert text.startswith("# NVIDIA Test 1\n")
    assert "| good | shows good | done |" in text and "fine" in text
    assert "| bad | shows bad | failed with exit code 3 |" in text and "broken" in text
    for name in ("long", "partly"):
        assert f"| {name} | shows {name} | stopped at its limit, goes on in the next call |" in text
    assert "| later | shows later | not measured |" in text
    state = json.loads((tmp_path / "runs" / "nvidia-test-1.json").read_text())
    assert state["good"]["tail"] == ["fine"] and state["long"]["tail"] == ["begun"]
    gpu_all.main(["--runs", str(tmp_path / "runs"), "--only", "good"])
    assert marker.read_text() == "xyyx"
    measured.write_text('{"left_out": []}')
    gpu_all.main(["--runs", str(tmp_path / "runs")])
    text = (tmp_path / "results" / "nvidia-test-1-summary.md").read_text()
    assert "| partly | shows partly | done |" in text and "| later | shows later | done |" in text
    assert marker.read_text() == "xyyxy"
    monkeypatch.setattr(gpu_all, "sources", lambda *more: "other code")
    gpu_all.main(["--runs", str(tmp_path / "runs")])
    assert marker.read_text() == "xyyxyxy", "what other code has done is done again"
    with pytest.raises(SystemExit):
        gpu_all.main(["--runs", str(tmp_path / "runs"), "--only", "typo"])


def test_a_small_card_computes_activations_again() -> None:
    again = ["--set", "checkpointing=true"]
    for memory, more in ((80e9, []), (24e9, []), (16e9, again), (1e9, again)):
        (step,) = [s for s in gpu_all.steps("python", "card", memory) if s.name == "kill-gate"]
        assert step.command[4:] == ["kill_gate", "--scale", "full", *more]


@pytest.mark.parametrize(
    "step", gpu_all.steps(sys.executable, "NVIDIA Test 1", 80e9), ids=lambda step: step.name
)
def test_every_step_is_short_and_exists(step: Step) -> None:
    assert step.minutes < 8
    python, flag, module, *_ = step.command
    assert (python, flag) == (sys.executable, "-m") and importlib.util.find_spec(module)

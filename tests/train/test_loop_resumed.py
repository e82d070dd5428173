"""train/loop.py: a run that was stopped goes on as if it had not been, or says why it cannot.

"The same" is bit for bit throughout: losses, gradient norms and parameters.
"""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from model import weights
from model.unimoer import UniMoER
from tests.train.same import assert_same
from tests.train.tiny import TRAIN, build
from train.loop import Callback, NonFiniteLoss, forget, owned, train


class Stopped(Exception):
    """Stands for whatever ends a run."""


def stop_after(step: int) -> Callback:
    def callback(at: int, line: dict) -> None:
        if at == step:
            raise Stopped

    return callback


@pytest.mark.parametrize("step", [0, 2, 3, 6, 7])
def test_stopped_and_continued_equals_unbroken(run, noisy, tmp_path, unbroken, step):
    """Checkpoints lie after steps 2 and 5, so a stop costs up to three steps."""
    place = tmp_path / "seed0"
    with pytest.raises(Stopped):
        run(noisy, place, stop_after(step))
    with open(place.with_name("seed0.log.jsonl"), "a") as file:
        file.write('{"step": 99, "loss_')  # the line that was being written
    torch.manual_seed(999)
    redone: list[int] = []
    assert_same(run(noisy, place, lambda at, line: redone.append(at)), unbroken)
    assert redone == list(range(3 * (step // 3), 8))
    lines = place.with_name("seed0.log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == unbroken[0]


def test_stopped_again_and_again(run, noisy, tmp_path, unbroken):
    place = tmp_path / "seed0"
    for step in (1, 3, 4, 5, 7, 6):
        with pytest.raises(Stopped):
            run(noisy, place, stop_after(step))
    assert_same(run(noisy, place), unbroken)


@pytest.mark.parametrize("moment", ["before the rename", "after the rename"])
def test_stopped_while_a_checkpoint_is_written(run, noisy, tmp_path, unbroken, monkeypatch, moment):
    save, calls = weights.save, []

    def broken(tensors, path, metadata=None):
        calls.append(path)
        if len(calls) == 2:  # the second one
            if moment == "after the rename":
                save(tensors, path, metadata)
            else:
                half = {name: tensor for name, tensor in tensors.items() if "lora_A" in name}
                save(half, path.with_name("state.safetensors.other"), metadata)
            raise Stopped
        save(tensors, path, metadata)

    monkeypatch.setattr(weights, "save", broken)
    with pytest.raises(Stopped):
        run(noisy, tmp_path / "seed0")
    monkeypatch.undo()
    assert_same(run(noisy, tmp_path / "seed0"), unbroken)


def test_a_log_without_checkpoint_is_begun_anew(run, noisy, tmp_path, unbroken):
    place = tmp_path / "seed0"
    place.with_name("seed0.log.jsonl").write_text('{"step": 0, "loss_embedding": 1e9}\n')
    assert_same(run(noisy, place), unbroken)


@pytest.mark.parametrize("lines", [None, [0, 1], [0, 0, 1, 1, 2, 2]])
def test_a_log_that_is_not_the_checkpoint_s_is_refused(run, noisy, tmp_path, lines):
    """Lost, cut, or of two processes: its curve would be none."""
    place = tmp_path / "seed0"
    with pytest.raises(Stopped):
        run(noisy, place, stop_after(4))
    log = place.with_name("seed0.log.jsonl")
    kept = log.read_text().splitlines()
    log.unlink()
    if lines is not None:
        log.write_text("".join(f"{kept[i]}\n" for i in lines))
    with pytest.raises(ValueError, match=r"log\.jsonl: expected the lines of the steps 0 to 2"):
        run(noisy, place)


def test_two_processes_at_one_trial(tmp_path):
    place = tmp_path / "arm" / "seed0"
    with owned(place):
        with (
            pytest.raises(ValueError, match="another process is at seed0: wait for it"),
            owned(place),
        ):
            pass
        with owned(place.with_name("seed1")):
            pass
    with owned(place):
        pass


def test_the_checkpoint_of_another_config_is_refused(run, noisy, tmp_path):
    place = tmp_path / "seed0"
    with pytest.raises(Stopped):
        run(noisy, place, stop_after(4))
    before = (tmp_path / "seed0.checkpoint" / "state.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"seed0\.checkpoint.*another config \(.*remove"):
        run(replace(noisy, learning_rate=1e-4), place)
    assert (tmp_path / "seed0.checkpoint" / "state.safetensors").read_bytes() == before
    # A field of another version is another config as well, not a TypeError.
    path = tmp_path / "seed0.checkpoint" / "state.safetensors"
    later = json.dumps(noisy.to_json() | {"a later field": 1})
    weights.save(load_file(path), path, {**weights.read_metadata(path), "config": later})
    with pytest.raises(ValueError, match="another config .*remove"):
        run(noisy, place)
    forget(place)
    assert list(tmp_path.iterdir()) == []


def test_a_place_in_a_new_folder(run, tiny, tmp_path):
    place = tmp_path / "new" / "arm" / "seed0"
    log, _ = run(replace(tiny, steps=4), place)
    assert len(log) == 4 and TRAIN // tiny.embedding_batch == 4
    assert (place.parent / "seed0.checkpoint" / "state.safetensors").exists()
    forget(place)
    forget(place)  # nothing is left, and nothing to complain about
    assert list(place.parent.iterdir()) == []


# What goes wrong --------------------------------------------------------------------------------


def spoil(model: UniMoER, at: int) -> Callback:
    """After step `at`, one parameter of the head is infinite."""

    def callback(step: int, line: dict) -> None:
        if step == at:
            with torch.no_grad():
                model.trained()["head.linear.weight"].fill_(math.inf)

    return callback


def test_a_loss_that_is_not_finite_stops_the_run(run, noisy, tmp_path, unbroken, collection):
    place, state = tmp_path / "seed0", tmp_path / "seed0.checkpoint" / "state.safetensors"
    model, data = build(noisy, collection)
    with pytest.raises(NonFiniteLoss) as caught:
        train(model, data, noisy, place, callback=spoil(model, 3))
    message = str(caught.value)
    assert message.startswith("step 4: loss nan")
    for name in [*data.embedding(4).ids, *data.reranking(4).ids]:
        assert f"'{name}'" in message
    assert str(state.parent) in message
    assert weights.read_metadata(state)["step"] == "3"
    lines = (tmp_path / "seed0.log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]  # not the one that failed
    # What is kept is good: without the fault it ends where it would have ended.
    assert_same(run(noisy, place), unbroken)


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_applied(
    tiny, tmp_path, collection
):
    model, data = build(tiny, collection)
    parameters = model.trained()
    parameters["head.linear.bias"].register_hook(lambda grad: grad * math.inf)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    with pytest.raises(NonFiniteLoss, match=r"^step 0: loss \d.*norm (nan|inf).*no checkpoint"):
        train(model, data, tiny, tmp_path / "a")
    assert all(torch.equal(p, before[name]) for name, p in parameters.items())

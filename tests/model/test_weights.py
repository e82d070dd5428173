"""Reading and writing checkpoints: exact names and shapes, any target layout, bounded memory, and
an error that names the file for everything that is not a whole safetensors file."""

import json
import os
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import weights

ROOT = Path(__file__).parents[2]


def tensors(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(3, 5, generator=g),
        "b.weight": torch.randn(7, generator=g).bfloat16(),
        "c.weight": torch.randn(2, 2, 2, generator=g).half(),
    }


def like(source, dtype=torch.float32):
    return {name: torch.full(t.shape, torch.nan, dtype=dtype) for name, t in source.items()}


def raw(path, header, data=b""):
    """A file with exactly this header, whether it makes sense or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def shard(folder, parts):
    """Write a sharded checkpoint, parts = {file name: tensors}."""
    for name, part in parts.items():
        save_file(part, folder / name)
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (folder / weights.INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_single_file_is_converted_to_the_targets(tmp_path, dtype):
    source = tensors()
    save_file(source, tmp_path / weights.SINGLE)
    targets = like(source, dtype)
    weights.load_into(tmp_path, targets)
    for name, target in targets.items():
        assert target.dtype is dtype
        assert torch.equal(target, source[name].to(dtype)), name


def test_sharded(tmp_path):
    source = tensors()
    a, b, c = source
    shard(tmp_path, {"x-1.safetensors": {a: source[a]}, "x-2.safetensors": {b: source[b]}})
    save_file({c: source[c]}, tmp_path / "unrelated.safetensors")
    targets = like({a: source[a], b: source[b]})
    weights.load_into(tmp_path, targets)
    assert torch.equal(targets[a], source[a]) and torch.equal(targets[b], source[b].float())


def test_strided_views_of_one_buffer(tmp_path):
    """The bordered buffer: columns of it, and a transposed view, are legal targets; what lies
    around them stays."""
    w, v = torch.randn(4, 6), torch.randn(3, 4)
    save_file({"w": w, "v": v}, tmp_path / weights.SINGLE)
    buffer = torch.full((4, 16), 7.0, dtype=torch.float64)
    weights.load_into(tmp_path, {"w": buffer[:, 1:7], "v": buffer[:, 8:14:2].T})
    assert torch.equal(buffer[:, 1:7], w.double()) and torch.equal(buffer[:, 8:14:2], v.T.double())
    rest = torch.ones(16, dtype=torch.bool)
    rest[1:7] = rest[8:14:2] = False
    assert (buffer[:, rest] == 7).all()


def test_parameters_that_need_gradients_scalars_and_empty_tensors(tmp_path):
    source = {"w": torch.randn(2, 3), "s": torch.tensor(3.5), "e": torch.empty(0, 4)}
    save_file(source, tmp_path / weights.SINGLE)
    targets = like(source)
    targets["w"] = torch.nn.Parameter(targets["w"])
    weights.load_into(tmp_path, targets)
    assert torch.equal(targets["w"], source["w"]) and targets["s"] == 3.5
    assert targets["w"].grad_fn is None


def test_unaligned_data(tmp_path):
    """Writers need not pad the header: the data may start at any byte."""
    value = torch.randn(5)
    header = {"w": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}}
    for pad in range(8):
        text = json.dumps(header).encode() + b" " * pad
        raw(tmp_path / weights.SINGLE, text, value.numpy().tobytes())
        targets = like({"w": value})
        weights.load_into(tmp_path, targets)
        assert torch.equal(targets["w"], value)


def test_all_differences_are_in_one_error_and_nothing_is_copied(tmp_path):
    source = tensors()
    save_file(source | {"extra": torch.zeros(9, 2)}, tmp_path / weights.SINGLE)
    targets = like(source) | {"gone": torch.full((4, 1), torch.nan)}
    targets["a.weight"] = torch.full((5, 3), torch.nan)
    with pytest.raises(ValueError) as caught:
        weights.load_into(tmp_path, targets)
    text = str(caught.value)
    assert str(tmp_path) in text and "3 differences" in text
    assert "missing: gone (4, 1)" in text
    assert "unexpected: extra (9, 2) in model.safetensors" in text
    assert "shape: a.weight is (3, 5) in model.safetensors, the model has (5, 3)" in text
    assert all(target.isnan().all() for target in targets.values())


def test_a_long_list_is_cut(tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / weights.SINGLE)
    targets = {f"layer{i:02}": torch.zeros(1) for i in range(30)}
    with pytest.raises(ValueError, match="31 differences") as caught:
        weights.load_into(tmp_path, targets)
    # Some of each kind: a hundred missing names do not hide what is there in their place.
    assert "layer04" in str(caught.value) and "layer05" not in str(caught.value)
    assert "unexpected: w" in str(caught.value) and "and 25 more" in str(caught.value)


def test_ignore_excuses_only_what_it_names(tmp_path):
    source = {f"layers.{i}.w": torch.full((1,), float(i)) for i in (0, 1, 10)}
    save_file(source | {"lm_head.weight": torch.ones(1)}, tmp_path / weights.SINGLE)
    targets = like({"layers.0.w": source["layers.0.w"]})
    weights.load_into(tmp_path, targets, ignore=lambda name: name not in targets)
    assert targets["layers.0.w"] == 0
    with pytest.raises(ValueError, match=r"1 differences(?s:.*)layers\.10\.w"):
        weights.load_into(
            tmp_path, targets, ignore=lambda name: name in ("layers.1.w", "lm_head.weight")
        )
    # A target that is in the file is loaded, and one that is not is missing, ignored or not
    targets = like(source)
    weights.load_into(tmp_path, targets, ignore=lambda name: True)
    assert targets["layers.10.w"] == 10
    with pytest.raises(ValueError, match="missing: z"):
        weights.load_into(tmp_path, {"z": torch.zeros(1)}, ignore=lambda name: True)


def test_trained_values_that_are_not_finite(tmp_path):
    tensors = {"good": torch.ones(2), "bad": torch.tensor([1.0, float("nan")])}
    targets = like(tensors)
    with pytest.raises(ValueError, match="adapters has values that are not finite in bad: "):
        weights.copy_exactly(tensors, targets, "adapters")
    assert targets["good"].isnan().all()


def test_values_beyond_fp16_and_integers_are_refused(tmp_path):
    save_file({"w": torch.tensor([1.0, 7e4]).bfloat16()}, tmp_path / weights.SINGLE)
    with pytest.raises(ValueError, match=r"w in .*float16 cannot hold"):
        weights.load_into(tmp_path, {"w": torch.zeros(2, dtype=torch.float16)})
    weights.load_into(tmp_path, {"w": torch.zeros(2)})
    save_file({"w": torch.tensor([1, 2], dtype=torch.int8)}, tmp_path / weights.SINGLE)
    with pytest.raises(ValueError, match="dtype: w is I8 in model.safetensors"):
        weights.load_into(tmp_path, {"w": torch.zeros(2)})


def test_every_truncation_names_the_file(tmp_path):
    path = tmp_path / weights.SINGLE
    save_file(tensors(), path)
    whole = path.read_bytes()
    for size in [*range(0, 24), len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="model.safetensors"):
            weights.load_into(tmp_path, like(tensors()))
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="is too long"):
        weights.load_into(tmp_path, like(tensors()))


@pytest.mark.parametrize(
    "content, found",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(100), "pickle"),
        (b"\x80\x02}q\x00." + bytes(100), "pickle"),
        (b"GGUF" + bytes(100), "GGUF"),
        (b"<!DOCTYPE html><html>" + bytes(100), "HTML"),
        (b"\xff" * 64, "not safetensors"),
        # A header length that the file could not hold must not be believed
        (struct.pack("<Q", 99_000_000) + b"{}", "truncated"),
        (struct.pack("<Q", 2**63) + b"{}", "not safetensors"),
    ],
)
def test_foreign_files_are_named_and_explained(tmp_path, content, found):
    (tmp_path / weights.SINGLE).write_bytes(content)
    with pytest.raises(ValueError, match=found) as caught:
        weights.read_header(tmp_path / weights.SINGLE)
    assert str(tmp_path / weights.SINGLE) in str(caught.value)


@pytest.mark.parametrize("length", [ord("<"), 0x80])
def test_a_header_whose_length_looks_like_a_page_or_a_pickle(tmp_path, length):
    header = b'{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    path = raw(tmp_path / "x.safetensors", header.ljust(length))
    assert weights.read_header(path)["w"].shape == (0,)


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"w": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


@pytest.mark.parametrize(
    "header",
    [
        b"{not json",
        b'{"w": 3}',
        b'{"w": {"dtype": "F32"}}',
        b'{"w": ' + b"[" * 100_000,
        b"{\xff\xfe}",
        entry(offsets=(0,)),
        entry(shape=(2,)),
        entry(shape=(-1,)),
        entry(offsets=(4, 0)),
        entry(offsets=(-4, 0)),
        entry(offsets=(0, 2**62)),
        entry(shape=(2**62,), offsets=(0, 2**64)),
        entry() | {"v": entry()["w"]},  # two tensors over the same bytes
    ],
    ids=str,
)
def test_damaged_headers(tmp_path, header):
    path = raw(tmp_path / weights.SINGLE, header, bytes(4))
    with pytest.raises(ValueError, match="model.safetensors"):
        weights.read_header(path)


def test_folders_without_a_checkpoint_say_what_is_there(tmp_path):
    targets = {"w": torch.zeros(1)}
    with pytest.raises(ValueError, match="does not exist"):
        weights.load_into(tmp_path / "none", targets)
    with pytest.raises(ValueError, match="it has nothing"):
        weights.load_into(tmp_path, targets)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="model-00001-of-00002.safetensors alone"):
        weights.load_into(tmp_path, targets)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(ValueError, match="pytorch_model.bin is a pickle.*not read"):
        weights.load_into(tmp_path, targets)


def test_index_errors(tmp_path):
    shard(
        tmp_path, {"s1.safetensors": {"a": torch.ones(1)}, "s2.safetensors": {"b": torch.ones(1)}}
    )
    targets = like({"a": torch.ones(1), "b": torch.ones(1)})
    weights.load_into(tmp_path, targets)
    (tmp_path / "s2.safetensors").unlink()
    with pytest.raises(ValueError, match="2 shards, of which 1 are not there: s2.safetensors"):
        weights.load_into(tmp_path, targets)
    save_file({"other": torch.ones(1)}, tmp_path / "s2.safetensors")
    with pytest.raises(ValueError, match="places b in s2.safetensors, which does not have it"):
        weights.load_into(tmp_path, targets)
    index = tmp_path / weights.INDEX
    index.write_text(json.dumps({"weight_map": {"a": "../s1.safetensors"}}))
    with pytest.raises(ValueError, match="not a file beside the index"):
        weights.load_into(tmp_path, targets)
    for text in ("", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}'):
        index.write_text(text)
        with pytest.raises(ValueError, match=r"index.json is not an index"):
            weights.load_into(tmp_path, targets)


def test_a_shard_with_a_tensor_that_the_index_forgot_is_unexpected(tmp_path):
    shard(tmp_path, {"s1.safetensors": {"a": torch.ones(1)}})
    save_file({"a": torch.ones(1), "b": torch.ones(2)}, tmp_path / "s1.safetensors")
    with pytest.raises(ValueError, match=r"unexpected: b \(2,\) in s1.safetensors"):
        weights.load_into(tmp_path, like({"a": torch.ones(1)}))


def test_save_and_read_back(tmp_path):
    path = tmp_path / "adapter.safetensors"
    buffer = torch.randn(6, 8)
    parts = {"A": buffer[:2], "B": buffer[:, 3:5], "C": torch.ones(3, requires_grad=True)}
    weights.save(parts, path, {"kind": "adapter"})
    assert [name for name in os.listdir(tmp_path)] == [path.name]  # no temporary file stays
    back = load_file(path)
    assert all(torch.equal(back[name], part) for name, part in parts.items())
    assert weights.read_metadata(path) == {"kind": "adapter"}
    header = weights.read_header(path)
    assert {n: (i.dtype, i.shape) for n, i in header.items()} == {
        "A": ("F32", (2, 8)),
        "B": ("F32", (6, 2)),
        "C": ("F32", (3,)),
    }
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode  # readable by whom the umask lets read


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "adapter.safetensors"
    weights.save({"a": torch.ones(2)}, path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(weights, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        weights.save({"a": torch.zeros(2)}, path)
    assert load_file(path)["a"].sum() == 2 and os.listdir(tmp_path) == [path.name]


def test_fingerprint_sees_values_names_and_files(tmp_path):
    def of(source):
        save_file(source, tmp_path / weights.SINGLE)
        return weights.fingerprint(tmp_path)

    first = of(tensors(0))
    assert first == of(tensors(0))
    assert len({first, of(tensors(1)), of({"x" + k: v for k, v in tensors(0).items()})}) == 3


def test_peak_memory_is_the_model_plus_one_tensor(tmp_path):
    """192 MB in 6 tensors of 32 MB, loaded in a fresh process: its peak (mapped pages included)
    may rise by a tensor over the preallocated model, and half of one for the rest: a kernel
    may map some MB of a file beyond what is read."""
    if not Path("/proc/self/status").exists():
        pytest.skip("reads the peak from /proc/self/status, which this system does not have")
    names = [f"layers.{i}.w" for i in range(6)]
    shard(
        tmp_path,
        {
            f"s{k}.safetensors": {n: torch.full((1 << 23,), float(k)) for n in names[k::2]}
            for k in range(2)
        },
    )
    code = """
        import re, sys
        from pathlib import Path
        import torch
        from model import weights

        def peak():  # kB; unlike ru_maxrss it does not begin with the parent's peak
            return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

        targets = {f"layers.{i}.w": torch.ones(1 << 23) for i in range(6)}
        warm = torch.ones(8).half().copy_(torch.ones(8))
        before = peak()
        weights.load_into(Path(sys.argv[1]), targets)
        assert all(bool((t == i % 2).all()) for i, t in enumerate(targets.values()))
        print(peak() - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 1.5 * 32768, f"{int(result.stdout)} kB beside the model"


def test_a_decoder_that_was_stored_alone_has_the_names_of_a_whole_model(tmp_path):
    stored = {"embed_tokens.weight": torch.ones(2), "layers.0.mlp.up_proj.weight": torch.ones(3)}
    stored |= {"norm.weight": torch.ones(4), "projector.0.weight": torch.ones(5)}
    weights.save(stored, tmp_path / "model.safetensors")
    whole = {name if name.startswith("p") else f"model.{name}": t for name, t in stored.items()}
    targets = {name: torch.zeros_like(t) for name, t in whole.items()}
    weights.load_into(tmp_path, targets)
    assert all(torch.equal(targets[name], t) for name, t in whole.items())

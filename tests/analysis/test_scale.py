"""Interference over size: slopes that were planted, and none."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import experiments
from analysis import overview, reports, scale, slopes
from eval import inference
from tests.analysis.made import Maker

SIZES = {8: 1000, 16: 2000, 30: 4000}  # layers -> parameters
Planted = dict[int, float]  # layers -> interference in %


@pytest.fixture(autouse=True)
def ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small ladder, which the made-up smoke trials climb."""
    row = experiments.EXPERIMENTS["scale_study"]
    monkeypatch.setitem(row.by_scale, "smoke", row.by_scale["small"])


def make(
    folder: Path, planted: Planted, lost: int = 0, noise: float = 0.002, seed: int = 0
) -> Path:
    """lost: the size at which nothing is learned."""
    maker = Maker(folder / "scale_study" / "smoke", noise, seed)
    maker.baselines()
    for layers, percent in planted.items():
        maker.baselines(f"baselines-{layers}l.json")
        special = 0.31 if layers == lost else 0.6
        more: dict[str, Any] = {"body_parameters": SIZES[layers]}
        joint = special * (1 - percent / 100)
        maker.arm(f"emb-only-{layers}l", {"embedding": special}, **more)
        maker.arm(f"rank-only-{layers}l", {"reranking": special}, **more)
        both = {"embedding": joint, "reranking": special}
        maker.arm(f"joint-single-{layers}l", both, **more)
    return maker.folder


def test_a_planted_slope_is_found(tmp_path: Path) -> None:
    """9, 6 and 3 % at sizes that double: three points less with each doubling."""
    folder = make(tmp_path, {8: 9.0, 16: 6.0, 30: 3.0}, seed=1)
    found = scale.write(folder)
    slopes = {row["task"]: row for row in found["slopes"]}
    assert slopes["embedding"]["slope"] == pytest.approx(-3, abs=0.5)
    low, high = slopes["embedding"]["interval"]
    assert low < -3 < high < 0 and slopes["embedding"]["p_holm"] <= inference.ALPHA
    low, high = slopes["reranking"]["interval"]
    assert low < 0 < high and slopes["reranking"]["p_holm"] > inference.ALPHA
    rows = {(r["layers"], r["task"]): r for r in found["rows"] if not r.get("missing")}
    for layers, percent in ((8, 9), (16, 6), (30, 3)):
        assert rows[layers, "embedding"]["interference"] == pytest.approx(percent, abs=1)
    text = (folder / "report.md").read_text()
    assert "I on retrieval falls by" in text and "At 8 layers, rank 16 the joint arm loses" in text
    assert (folder / "scale.png").exists()


def test_a_planted_slope_over_the_rank_is_found(tmp_path: Path) -> None:
    """10, 8, 6 and 4 % at ranks 1, 4, 16 and 64: a point less with each doubling."""
    folder = make(tmp_path, {16: 6.0})
    maker = Maker(folder, 0.002, 1)
    for rank, percent in ((1, 10.0), (4, 8.0), (64, 4.0)):
        joint = {"embedding": 0.6 * (1 - percent / 100), "reranking": 0.6}
        for arm, means in (("emb-only", {"embedding": 0.6}), ("rank-only", {"reranking": 0.6}),
                           ("joint-single", joint)):  # fmt: skip
            maker.arm(f"{arm}-r{rank}", means, body_parameters=SIZES[16])
    found = scale.write(folder)
    slopes = {(row["axis"], row["task"]): row for row in found["slopes"]}
    assert {axis for axis, _ in slopes} == {"rank"}
    assert slopes["rank", "embedding"]["slope"] == pytest.approx(-1, abs=0.2)
    assert slopes["rank", "embedding"]["p_holm"] <= inference.ALPHA
    low, high = slopes["rank", "reranking"]["interval"]
    assert low < 0 < high


def test_the_slope_is_the_least_squares_line(tmp_path: Path) -> None:
    found = scale.write(make(tmp_path, {8: 9.0, 16: 2.0, 30: 4.0}))
    line = [r for r in found["rows"] if r["task"] == "embedding" and r.get("interval")]
    x = [math.log2(r["parameters"]) for r in line]
    y = [r["interference"] for r in line]
    middle_x, middle_y = sum(x) / 3, sum(y) / 3
    expected = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True))
    expected /= sum((a - middle_x) ** 2 for a in x)
    assert found["slopes"][0]["slope"] == pytest.approx(expected)
    # Of two points the line goes through both.
    ends = [(y[j] - y[i]) / (x[j] - x[i]) for i, j in ((0, 1), (0, 2), (1, 2))]
    left = [row["slope"] for row in found["slopes"][0]["without"]]
    # First the one without which least of the fall is left: here it becomes a rise.
    assert found["slopes"][0]["slope"] < 0 < max(ends)
    assert left == pytest.approx(sorted(ends, reverse=True))


@pytest.mark.parametrize("form", ["relative", "gain", "points"])
def test_the_derivatives_of_a_loss_are_its_differences(form: str) -> None:
    at, step = [0.5, 0.4, 0.2], 1e-6
    value, *slopes_of = slopes.loss(form, *at)
    assert value == pytest.approx({"relative": 20, "gain": 100 / 3, "points": 10}[form])
    for i, expected in enumerate(slopes_of):
        more, less = ([x + s * step * (k == i) for k, x in enumerate(at)] for s in (1, -1))
        found = (slopes.loss(form, *more)[0] - slopes.loss(form, *less)[0]) / (2 * step)
        assert found == pytest.approx(expected, abs=1e-5)


def test_slopes_of_the_loss_in_other_units(tmp_path: Path) -> None:
    """Least-squares lines through the same means, each in its unit."""
    found = scale.study(
        folder := make(tmp_path, {8: 9.0, 16: 6.0, 30: 1.0}), *scale.disk.load(folder)
    )
    rows = [row for row in found["rows"] if row["task"] == "embedding" and not row.get("missing")]
    [line] = [row for row in found["slopes"] if row["task"] == "embedding"]
    x = [math.log2(row["parameters"]) for row in rows]
    for form, unit in (("gain", lambda r: r["specialist"] - r["base"]), ("points", lambda r: 1.0)):
        y = [100 * (r["specialist"] - r["joint"]) / unit(r) for r in rows]
        assert line["other"][form]["slope"] == pytest.approx(np.polyfit(x, y, 1)[0])
        low, high = line["other"][form]["interval"]
        assert low < line["other"][form]["slope"] < high < 0


def test_the_interval_of_the_slope_covers(tmp_path: Path, monkeypatch) -> None:
    """Planted 0 at all sizes: over 60 made-up studies 95 % intervals miss 0 about 3 times."""
    monkeypatch.setattr(inference, "smallest_detectable_effect", lambda *of: 1.0)  # slow, not read
    missed = 0
    for seed in range(60):
        folder = make(tmp_path / str(seed), dict.fromkeys(SIZES, 0.0), seed=seed, noise=0.01)
        row = scale.study(folder, *scale.disk.load(folder))["slopes"][0]
        missed += not row["interval"][0] <= 0 <= row["interval"][1]
    assert missed <= 8


def test_a_size_that_is_not_measurable_is_shown_and_left_out(tmp_path: Path) -> None:
    folder = make(tmp_path, {8: 50.0, 16: 6.0, 30: 3.0}, lost=8)
    found = scale.write(folder)
    assert found["slopes"][0]["sizes"] == ["16l", "30l"]
    text = (folder / "report.md").read_text()
    assert "Not measurable: retrieval at 8 layers" in text and "| **no** |" in text


def test_missing_sizes_are_shown_as_missing(tmp_path: Path) -> None:
    text = (make(tmp_path, {8: 1.0, 16: 2.0}) / "x").parent
    scale.write(text)
    assert "| 24l | retrieval | missing |" in (text / "report.md").read_text()


def test_what_was_run_is_not_called_missing(tmp_path: Path) -> None:
    """A rank of one seed has no slope, but it was run; a size without its joint arm has scores."""
    maker = Maker(make(tmp_path, {8: 1.0, 16: 2.0}))
    for arm, means in (("emb-only-r4", {"embedding": 0.5}), ("rank-only-r4", {"reranking": 0.5}),
                       ("joint-single-r4", {"embedding": 0.45, "reranking": 0.5})):  # fmt: skip
        maker.arm(arm, means, seeds=1, changes={"ranks": [4]}, body_parameters=2000)
    shutil.rmtree(maker.folder / "joint-single-8l")
    found = scale.write(maker.folder)
    said = " ".join(scale.limits(found))
    assert "second axis of capacity: fewer than two sizes are measurable" in said
    assert "missing or not whole: 8 layers, rank 16, 12l, 24l, 30l." in said
    text = (maker.folder / "report.md").read_text()
    [row] = [line for line in text.splitlines() if line.startswith("| 8 layers, rank 16 | ret")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3].startswith("59.98 ±") and cells[4] == "missing" and cells[6] == "-"


def test_a_size_without_its_baselines_is_an_error(tmp_path: Path) -> None:
    folder = make(tmp_path, {8: 1.0, 16: 2.0})
    (folder / "baselines-8l.json").unlink()
    with pytest.raises(ValueError, match="baselines-8l.json"):
        scale.write(folder)


BASES = {"Qwen3-0.6B-Base": 1024, "Qwen3-1.7B-Base": 2048, "Qwen3-4B-Base": 2560,
         "Mistral-7B-v0.3": 4096}  # fmt: skip


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The full ladder, which the made-up smoke trials climb."""
    row = experiments.EXPERIMENTS["scale_study"]
    monkeypatch.setitem(row.by_scale, "smoke", row.by_scale["full"])


def make_bases(folder: Path, planted: dict[str, float]) -> Path:
    """A setting for each base, of full scale; planted at fixed rank, 9 % at fixed share."""
    setting = folder
    for i, (name, percent) in enumerate(planted.items()):
        setting = folder / "scale_study" / f"full-{name.lower()}"
        maker = Maker(setting, noise=0.001)
        base = {"name": f"org/{name}", "revision": None, "fingerprint": name}
        maker.baselines(base=base)
        for suffix, rank, loss in (("", 16, percent), ("-w64", BASES[name] // 64, 9.0)):
            more: dict[str, Any] = {"body_parameters": 1000 * 2**i, "width": BASES[name]}
            for arm, means in (
                (f"emb-only{suffix}", {"embedding": 0.6}),
                (f"rank-only{suffix}", {"reranking": 0.6}),
                (f"joint-single{suffix}", {"embedding": 0.6 * (1 - loss / 100), "reranking": 0.6}),
            ):
                maker.arm(arm, means, changes={"ranks": [rank]}, base=base, **more)
    return setting


def test_bases_of_other_settings_are_taken_in(whole: None, tmp_path: Path) -> None:
    """The line is through the family with the most sizes; the other stands beside it."""
    planted = dict(zip(BASES, (9.0, 6.0, 3.0, 20.0), strict=True))
    folder = make_bases(tmp_path, planted)
    found = scale.write(folder)
    slopes = {(row["axis"], row["task"]): row for row in found["slopes"]}
    at = slopes["parameters", "embedding"]
    assert at["family"] == "qwen3" and len(at["sizes"]) == 3
    assert at["slope"] == pytest.approx(-3, abs=0.5)
    share = slopes["share", "embedding"]
    assert share["slope"] == pytest.approx(0, abs=0.5) and len(share["sizes"]) == 3
    rows = {(row["size"], row["task"]): row for row in found["rows"]}
    assert rows["", "embedding"]["interference"] == pytest.approx(20, abs=1)  # Mistral's own
    text = (folder / "report.md").read_text()
    assert "| Qwen3-1.7B-Base, 2 layers, rank 32 |" in text
    assert "full-qwen3-4b-base/emb-only/seed0.json" in text
    assert "when they double and the rank grows with the width" in text


def test_a_setting_with_other_queries_or_data_stays_out(whole: None, tmp_path: Path) -> None:
    folder = make_bases(tmp_path, {"Qwen3-0.6B-Base": 9.0, "Qwen3-1.7B-Base": 6.0})
    other = folder.parent / "full-qwen3-0.6b-base" / "baselines.json"
    assert scale.others(folder) == {other.parent: []}
    content = json.loads(other.read_text())
    assert content["config"].pop("matryoshka") == []  # of older code, which knew no such field
    other.write_text(json.dumps(content))
    assert scale.others(folder) == {other.parent: []}
    other.write_text(json.dumps({**content, "data": {**content["data"], "fingerprint": "another"}}))
    assert scale.others(folder) == {}
    other.write_text(json.dumps(content))
    trial = other.parent / "emb-only" / "seed0.json"  # trained for longer: not the size alone
    changed = json.loads(trial.read_text())
    changed["config"]["steps"] += 1
    trial.write_text(json.dumps(changed))
    assert scale.others(folder) == {other.parent: ["steps"]}
    said = "Anything about `full-qwen3-0.6b-base`, which differs in more than the base: steps."
    assert said in scale.limits(scale.write(folder))


def test_published_bases_that_take_each_other_in_are_not_stale(whole: None, tmp_path: Path) -> None:
    make_bases(tmp_path, {"Qwen3-0.6B-Base": 9.0, "Qwen3-1.7B-Base": 6.0})
    settings = sorted((tmp_path / "scale_study").iterdir())

    def report(experiment: str, folder: Path) -> str:
        return reports.summary(scale, scale.write(folder))

    for _ in range(2):  # the first report is written before the second setting has one
        for setting in settings:
            overview.write(tmp_path, setting.name, report)
    assert overview.stale(tmp_path, report) == []


def test_sizes_may_be_missing_before_the_first_that_is_there(tmp_path: Path) -> None:
    folder = make(tmp_path, {16: 6.0})
    assert scale.write(folder)["rows"][0]["missing"]  # of 8 layers

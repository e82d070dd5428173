"""One page for all experiments, published reports against their trials, tables for LaTeX."""

import json
import re
from pathlib import Path

import pytest

import experiments
import run
from analysis import compare, overview, report, reports
from model import files
from tests.analysis.made import Maker

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """results/ with one experiment whose report was written."""
    maker = Maker(tmp_path / "results" / "soft_vs_hard" / "smoke")
    maker.baselines()
    for arm in ("sparsegen", "uniform"):
        maker.arm(arm, {"embedding": 0.5, "reranking": 0.4})
    overview.write(tmp_path / "results", "smoke", rewrite)
    return tmp_path / "results"


def rewrite(experiment: str, folder: Path) -> str:
    return compare.summary(compare.write(folder))


def test_what_this_repository_publishes_follows_from_its_trials() -> None:
    assert overview.stale(ROOT / "results", reports.write) == []


def test_a_report_that_follows_is_not_stale(published: Path) -> None:
    assert overview.stale(published, rewrite) == []


@pytest.mark.parametrize("name", ["report.md", "comparison.json"])
def test_a_number_changed_by_hand_is_stale(name: str, published: Path) -> None:
    path = published / "soft_vs_hard" / "smoke" / name
    path.write_text(path.read_text().replace("50.", "51.").replace("0.5", "0.6"))
    assert overview.stale(published, rewrite) == [str(path)]


def test_the_last_bits_of_another_processor_are_not_stale(published: Path) -> None:
    path = published / "soft_vs_hard" / "smoke" / "comparison.json"
    found = json.loads(path.read_text())
    row = found["differences"][0]
    row["difference"] *= 1 + 1e-13
    path.write_text(json.dumps(found, indent=1) + "\n")
    assert overview.stale(published, rewrite) == []
    row["difference"] *= 1 + 1e-6
    path.write_text(json.dumps(found, indent=1) + "\n")
    assert overview.stale(published, rewrite) == [str(path)]


def test_a_trial_that_was_added_makes_the_report_stale(published: Path) -> None:
    folder = published / "soft_vs_hard" / "smoke"
    Maker(folder).arm("task", {"embedding": 0.5, "reranking": 0.4})
    assert {Path(path).name for path in overview.stale(published, rewrite)} == {
        "report.md", "comparison.json", "smoke.md"
    }  # fmt: skip


def test_an_overview_that_is_missing_or_says_something_else_is_stale(published: Path) -> None:
    path = published / "smoke.md"
    assert "[Soft vs hard](soft_vs_hard/smoke/report.md)" in path.read_text()
    assert re.search(r"\nSources `ssssssss`; cpu, 1 threads, (auto|float32)\.\n", path.read_text())
    path.write_text(path.read_text().replace("points", "pints"))
    assert overview.stale(published, rewrite) == [str(path)]
    path.unlink()
    assert overview.stale(published, rewrite) == [str(path)]


def test_a_report_that_is_missing_is_stale(published: Path) -> None:
    path = published / "soft_vs_hard" / "smoke" / "report.md"
    path.unlink()
    assert overview.stale(published, rewrite) == [str(path)]


def test_a_report_that_cannot_be_written_keeps_no_other(published: Path, capsys) -> None:
    """A setting without baselines: the others are written, and it is named."""
    Maker(published / "soft_vs_hard" / "smoke-other").arm(
        "task", {"embedding": 0.5}
    )  # no baselines
    (published / "soft_vs_hard" / "smoke" / "report.md").unlink()
    assert run.main(["report", "--runs", str(published)]) == 2
    assert "smoke-other" in capsys.readouterr().err
    assert (published / "soft_vs_hard" / "smoke" / "report.md").exists()
    found = overview.stale(published, rewrite)
    assert found and all("smoke-other" in path for path in found)


def test_figures_of_a_mixture_are_seen() -> None:
    page = "![a](small-scifact+fiqa-interference.png) ![b](../elsewhere/x.png)"
    assert overview.figures_of(page) == ["small-scifact+fiqa-interference"]


def test_tables_for_latex_follow_too(published: Path) -> None:
    path = published / "soft_vs_hard" / "smoke" / "tables.tex"
    run.main(["report", "soft_vs_hard", "--runs", str(published), "--latex"])
    assert overview.stale(published, rewrite) == []
    path.write_text(path.read_text().replace("50.", "51."))
    assert overview.stale(published, rewrite) == [str(path)]


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_figure_that_is_missing_or_left_over_is_stale(kind: str, published: Path) -> None:
    folder = published / "soft_vs_hard" / "smoke"
    shown = folder / f"{overview.figures_of((folder / 'report.md').read_text())[0]}.{kind}"
    shown.unlink()
    assert overview.stale(published, rewrite) == [str(shown)]
    shown.touch()
    for place in (folder, published):
        old = place / f"old.{kind}"
        old.touch()
        assert overview.stale(published, rewrite) == [str(old)]
        old.unlink()


def test_the_overview_names_what_was_not_run(tmp_path: Path) -> None:
    said = {"kill_gate": "kill_gate small, x: Proceed.\nSupported: no."}
    page = overview.markdown("small", said, tmp_path)
    assert "## [Kill gate](kill_gate/small/report.md)" in page
    assert "\nProceed.\n- Supported: no.\n" in page
    assert "Not run in this setting: scale_study" in page


def test_a_trial_that_stands_in_two_experiments_took_its_time_once(tmp_path: Path) -> None:
    for name, arm, train in (("kill_gate", "joint-moe", 60.0), ("soft_vs_hard", "sparsegen", 90.0)):
        maker = Maker(tmp_path / name / "smoke")
        maker.arm(arm, {"embedding": 0.5, "reranking": 0.4}, seeds=2)
        for seed in (0, 1):
            path = maker.folder / arm / f"seed{seed}.json"
            seconds = {"prepare": 1.5 + seed, "train": train, "test": 30.25 + seed}
            path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": seconds}))
    text = overview.cost([tmp_path / name / "smoke" for name in ("kill_gate", "soft_vs_hard")])
    # One watched its gradients: that time was spent too.
    assert "2 trials, which 4 files hold" in text and "4 minutes" in text  # 245.5 s


def test_collections_stand_side_by_side(tmp_path: Path) -> None:
    for name in ("smoke", "smoke-other"):
        maker = Maker(tmp_path / "kill_gate" / name)
        maker.baselines()
        maker.arm("emb-only", {"embedding": 0.5})
        maker.arm("rank-only", {"reranking": 0.5})
        maker.arm("joint-single", {"embedding": 0.5, "reranking": 0.45})
        assert overview.collections(tmp_path, "smoke") == ""
        report.write(maker.folder)
    found = overview.collections(tmp_path, "smoke")
    verdict = json.loads((maker.folder / "verdict.json").read_text())
    value = verdict["tasks"]["reranking"]["interference"]
    assert "| [smoke-other](kill_gate/smoke-other/report.md) | " in found
    assert f"{value:+.2f} % [" in found and found.count("| proceed | yes | sssssss |") == 2
    assert overview.collections(tmp_path, "smoke-other") == ""


def test_what_agrees_between_collections_is_said() -> None:
    def row(loss: float, p: float, measurable: bool = True, back: tuple | None = None) -> dict:
        return {"interference": loss, "p_holm": p, "measurable": measurable,
                "won_back_interval": back}  # fmt: skip

    def verdict(
        decision: str | None, embedding: dict, reranking: dict, supported: bool = False
    ) -> dict:
        return {"decision": decision, "alpha": 0.02, "supported": supported,
                "tasks": {"embedding": embedding, "reranking": reranking}}  # fmt: skip

    text = overview.agreement({
        "a": verdict("proceed", row(4.0, 0.05), row(5.0, 0.01, back=(0.1, 0.9)), True),
        "b": verdict("proceed", row(-2.0, 0.0), row(1.0, 0.9, back=(-0.1, 0.9))),
        "c": verdict("pivot", row(9.0, 0.01, measurable=False), row(2.0, 0.03)),
    })  # fmt: skip
    decided = "The decision is proceed in 2 of 3 settings, pivot in 1; the statistics support it"
    assert f"{decided} in 1 (a)." in text
    assert "On retrieval, measurable in 2, I is above 0 in 1 (-2.0 to +4.0 %), significant" in text
    assert "significant at its look's level in b; Joint-MoE" in text
    assert "On reranking, measurable in 3, I is above 0 in 3 (+1.0 to +5.0 %), significant" in text
    assert "level in a; Joint-MoE wins back a significant part in a." in text
    nothing = {"a": verdict(None, row(1.0, 0.5, False), row(1.0, 0.5, False))}
    said = overview.agreement(nothing)
    assert "Nowhere is reranking measurable." in said
    assert "There is no verdict in 1 of 1 settings; the statistics support it in none." in said


def test_publishing_a_collection_renews_the_page_that_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "ROOT", tmp_path)
    for data in ("stdlib", "scifact"):
        setting = experiments.setting_name("smoke", "smollm2-135m", data)
        maker = Maker(tmp_path / "runs" / "kill_gate" / setting)
        maker.baselines()
        maker.arm("emb-only", {"embedding": 0.5})
        maker.arm("rank-only", {"reranking": 0.5})
        maker.arm("joint-single", {"embedding": 0.5, "reranking": 0.45})
        words = ["publish", "kill_gate", "--scale", "smoke", "--data", data, "--partial"]
        assert run.main([*words, "--runs", str(tmp_path / "runs")]) == 0
    results = tmp_path / "results"
    assert "[smoke-scifact](kill_gate/smoke-scifact/" in (results / "smoke.md").read_text()
    assert overview.stale(results, reports.write) == []


def test_a_publish_that_is_killed_leaves_nothing_that_looks_like_a_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two renames, and while it copies; the next one removes what was left."""
    monkeypatch.setattr(run, "ROOT", tmp_path)
    maker = Maker(tmp_path / "runs" / "soft_vs_hard" / "smoke")
    maker.baselines()
    for arm in ("sparsegen", "uniform"):
        maker.arm(arm, {"embedding": 0.5, "reranking": 0.4})
    words = ["publish", "soft_vs_hard", "--scale", "smoke", "--partial"]
    words += ["--runs", str(tmp_path / "runs")]
    assert run.main(words) == 0
    results = tmp_path / "results"
    place = results / "soft_vs_hard"
    before = {p: p.read_bytes() for p in (place / "smoke").rglob("*") if p.is_file()}

    def killed(*_: object) -> None:
        raise SystemExit(137)

    for module, name, left in (
        (files, "put", {".smoke.part", ".smoke.old"}),
        (run, "put_over", {".smoke.part", "smoke"}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, killed)
            with pytest.raises(SystemExit):
                run.main(words)
        assert {path.name for path in place.iterdir()} == left
        stale = {Path(path).relative_to(results) for path in overview.stale(results, reports.write)}
        assert stale == (set() if "smoke" in left else {Path("smoke.md")})
        assert run.main(words) == 0
        assert [path.name for path in place.iterdir()] == ["smoke"]
        assert {p: p.read_bytes() for p in before if p.suffix == ".json"} == {
            p: content for p, content in before.items() if p.suffix == ".json"
        }
        assert overview.stale(results, reports.write) == []


def test_latex_tables() -> None:
    report = """# T

## Scores & more

| arm | *nDCG* |
| --- | ---: |
| **A_1** | +1.00 % ± 0.20 [a, b] |
| p of \\|I\\| ≥ 2 | [text](link.md) \\n |

no table
"""
    assert (
        overview.latex(report)
        == r"""% Scores & more
\begin{tabular}{lr}
\toprule
arm & nDCG \\
\midrule
\textbf{A\_1} & +1.00 \% $\pm$ 0.20 [a, b] \\
p of |I| $\geq$ 2 & text \textbackslash{}n \\
\bottomrule
\end{tabular}
"""
    )


def test_report_of_all_experiments(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["report", "--scale", "smoke", "--runs", str(published), "--latex"]
    assert run.main(line) == 0
    assert "soft_vs_hard" in (published / "smoke.md").read_text()
    assert r"\toprule" in (published / "soft_vs_hard/smoke/tables.tex").read_text()
    assert run.main(["report", "--scale", "smoke", "--runs", str(tmp_path / "none")]) == 0
    assert "no trial of smoke" in capsys.readouterr().out
    assert run.main(["report", "nothing"]) == 2
    assert "unknown experiment 'nothing'" in capsys.readouterr().err


def test_without_a_setting_all_that_were_run_are_reported(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """smoke on two collections, and another experiment on one of them."""
    for name in ("soft_vs_hard/smoke-scifact", "remedies/smoke"):
        maker = Maker(published / name)
        maker.baselines()
        maker.arm("joint-single", {"embedding": 0.5, "reranking": 0.4})
    line = ["report", "--runs", str(published)]
    (published / "smoke.md").unlink()
    assert run.main([*line, "soft_vs_hard"]) == 0
    assert (published / "soft_vs_hard/smoke-scifact/report.md").exists()
    assert not (published / "remedies/smoke/report.md").exists()
    assert run.main(line) == 0
    assert "(remedies/smoke/report.md)" in (published / "smoke.md").read_text()
    assert "(soft_vs_hard/smoke-scifact/report.md)" in (published / "smoke-scifact.md").read_text()
    assert "no trial" not in capsys.readouterr().out
    assert run.main(["report", "--data", "scifact", "--runs", str(published)]) == 0
    assert "no trial of small-scifact" in capsys.readouterr().out


def test_what_is_published_names_no_folder_of_this_machine() -> None:
    made = {"config": {"base": "org/name", "data": "/home/me/scifact", "end_token": "/x"},
            "data": {"name": "scifact", "path": "/home/me/scifact"}, "seed": 1}  # fmt: skip
    assert overview.portable(made) == {
        "config": {"base": "org/name", "data": "scifact", "end_token": "/x"},
        "data": {"name": "scifact", "path": "scifact"}, "seed": 1}  # fmt: skip
    mixed = {"base": "b", "data": "/home/me/scifact+msmarco", "negatives": "/x/mined+bm25"}
    found = overview.portable({"config": mixed, "data": {}})["config"]
    assert found == {"base": "b", "data": "scifact+msmarco", "negatives": "mined+bm25"}
    of_a_measure = {"config": {"data": "stdlib", "measured_on": "/home/me/fiqa"}, "data": "3f2a"}
    assert overview.portable(of_a_measure) == {
        "config": {"data": "stdlib", "measured_on": "fiqa"}, "data": "3f2a"}  # fmt: skip

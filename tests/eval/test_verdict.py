"""eval/rule.py: the decision of a study, what its verdict holds, what is refused."""

import json

import numpy as np
import pytest

from eval import inference, rule, stats
from tests.eval.studies import AB, J, P, study, task

# ---- the decision -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("embedding", "reranking", "seeds", "decision"),
    [
        (task(0.99), task(0.99), 3, "pivot"),
        (task(-8.0), task(0.0), 3, "pivot"),
        (task(1.0), task(0.99), 3, "more_seeds"),
        (task(1.0 - 1e-13), task(0.0), 3, "more_seeds"),  # 1 % but for rounding
        (task(0.5), task(1.99), 8, "more_seeds"),
        (task(0.5), task(1.99), 9, "inconclusive"),
        (task(0.5), task(1.5), 12, "inconclusive"),
        (task(2.0), task(-5.0), 3, "proceed"),
        (task(2.0 - 1e-13), task(1.5), 9, "proceed"),
        (task(0.0), task(2.01), 9, "proceed"),
        # Not measurable is not "no interference": it neither proceeds nor lets pivot.
        (task(50.0, measurable=False), task(0.1), 3, "inconclusive"),
        (task(None, measurable=False), task(0.1), 9, "inconclusive"),
        (task(0.1, measurable=False), task(1.5), 3, "more_seeds"),
        (task(0.1, measurable=False), task(1.5), 9, "inconclusive"),
        (task(0.1, measurable=False), task(2.5), 3, "proceed"),
        (task(9.0, measurable=False), task(9.0, measurable=False), 3, "inconclusive"),
    ],
)
def test_decision_table(embedding, reranking, seeds, decision):
    got = rule.decide({"embedding": embedding, "reranking": reranking}, seeds)
    assert got["decision"] == decision
    assert not got["supported"]
    for name, t in (("retrieval", embedding), ("reranking", reranking)):
        assert (f"{name} is not measurable" in got["reason"]) == (not t["measurable"])


def test_supported_proceed_needs_the_large_task_significant():
    alpha = rule.alpha_at_look(3)
    small = task(0.5, p_holm=1e-6, p_equivalence=1e-6)
    for p, expected in ((alpha, True), (alpha * 1.001, False), (0.03, False)):
        got = rule.decide({"a": task(2.5, p_holm=p), "b": small}, 3)
        assert (got["decision"], got["supported"]) == ("proceed", expected)
    # Either of two large tasks will do; a task that is not measurable will not.
    assert rule.decide({"a": task(2.5), "b": task(3, p_holm=0.001)}, 3)["supported"]
    hidden = task(9, measurable=False, p_holm=1e-6)
    assert not rule.decide({"a": task(2.5), "b": hidden}, 3)["supported"]
    # The level is that of the look: what passes at three seeds does not at nine.
    assert not rule.decide({"a": task(2.5, p_holm=0.02)}, 9)["supported"]
    assert rule.decide({"a": task(2.5, p_holm=0.02)}, 9, alpha=0.05)["supported"]


def test_supported_pivot_needs_both_equivalent():
    good = task(0.2, p_equivalence=0.02)
    assert rule.decide({"a": good, "b": good}, 3)["supported"]
    assert not rule.decide({"a": good, "b": task(0.2, p_equivalence=0.03)}, 3)["supported"]
    with pytest.raises(ValueError, match="need a task"):
        rule.decide({}, 3)


# ---- the verdict --------------------------------------------------------------------------------


def test_verdict_fields():
    scores, base, clusters = study(np.random.default_rng(5), lose=("embedding",), by=12.0)
    labels = {t: [f"module{c}" for c in ids] for t, ids in clusters.items()}
    got = rule.verdict(scores, base, labels)
    assert json.loads(json.dumps(got, allow_nan=False)) == got
    assert (got["decision"], got["supported"], got["seeds"]) == ("proceed", True, 3)
    assert got["alpha"] == rule.alpha_at_look(3)
    e = got["tasks"]["embedding"]
    arms, pair = scores["embedding"], ("emb-only", "joint-single")
    alone = stats.interference(arms, labels["embedding"], *pair)
    assert (e["interference"], e["se"], e["df"], e["p"]) == (
        alone.value,
        alone.se,
        alone.df,
        alone.p,
    )
    assert e["interval"] == alone.interval
    assert e["p_equivalence"] == inference.tost(alone.value, alone.se, alone.df, 2.0)
    assert e["detectable_alpha"] == got["alpha"] / 2
    assert e["smallest_detectable_effect"] == inference.smallest_detectable_effect(
        alone.se, alone.df, got["alpha"] / 2
    )
    back = stats.won_back(arms, labels["embedding"], *pair, "joint-moe")
    assert (e["won_back"], e["won_back_interval"]) == (back.value, back.interval)
    assert "excludes 0" in e["won_back_reason"]
    assert e["gain_normalised"] == pytest.approx(
        (e["specialist"] - e["joint"]) / (e["specialist"] - e["base"])
    )
    r = got["tasks"]["reranking"]
    ps = inference.holm([e["p"], r["p"]])
    assert [e["p_holm"], r["p_holm"]] == ps
    assert r["won_back"] is None and "no loss" in r["won_back_reason"]


def test_measurable_is_a_gain_of_a_twentieth():
    scores = {"embedding": {"emb-only": P, "joint-single": P}}
    for base, expected in ((0.45, True), (0.4501, False)):
        got = rule.verdict(scores, {"embedding": np.full(4, base)}, {"embedding": AB})
        assert got["tasks"]["embedding"]["measurable"] == expected
        assert (got["tasks"]["embedding"]["gain_normalised"] is None) == (not expected)
        assert got["tasks"]["embedding"]["won_back_reason"] == "joint-moe was not run"
        assert got["decision"] == ("pivot" if expected else "inconclusive")
    # A specialist that finds nothing at all: no relative loss, no crash.
    dead = {"embedding": {"emb-only": 0 * P, "joint-single": P}}
    got = rule.verdict(dead, {"embedding": np.zeros(4)}, {"embedding": AB})
    assert got["tasks"]["embedding"]["interference"] is None
    assert got["decision"] == "inconclusive"


def test_one_seed_has_no_interval():
    scores, base, clusters = study(np.random.default_rng(5), 1, ("embedding",), 12.0)
    got = rule.verdict(scores, base, clusters)
    assert json.loads(json.dumps(got, allow_nan=False)) == got
    assert (got["decision"], got["supported"]) == ("proceed", False)
    assert "seed variance is unknown" in got["reason"]
    e = got["tasks"]["embedding"]
    assert e["interference"] > 2 and e["p_randomisation"] < 0.01
    for key in ("interval", "se", "df", "p", "p_holm", "p_equivalence", "seed_sd", "won_back"):
        assert e[key] is None, key
    assert e["smallest_detectable_effect"] is None and e["gain_normalised_interval"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, b, c: s.update(j=J[:, :3]), r"'j' has shape \(2, 3\), 'p' \(2, 4\)"),
        (lambda s, b, c: s.update(j=J[0]), r"'j' has shape \(4,\)"),
        (lambda s, b, c: s.update(j=J[:0]), r"'j' has shape \(0, 4\)"),
        (lambda s, b, c: s.update(j=np.where(J == J[1, 2], np.nan, J)), r"nan at .* \[0, 0\]"),
        (lambda s, b, c: s.pop("j"), r"no scores for arm 'j'; there are \['p'"),
        (lambda s, b, c: b.update(t=np.zeros((20, 4))), r"has shape \(1, 20, 4\)"),
        (lambda s, b, c: b.update(t=np.zeros(5)), r"'untrained base' has shape \(1, 5\)"),
        (lambda s, b, c: b.update(t=np.full(4, np.inf)), "'untrained base' scores inf"),
        (lambda s, b, c: b.pop("t"), r"no base for \['t'\]"),
        (lambda s, b, c: c.update(t=["a"] * 4), "4 queries in 1 cluster; expected 2"),
        (lambda s, b, c: c.update(t=["a", "b"]), r"shape \(2,\); expected \(4,\)"),
        (lambda s, b, c: c.pop("t"), r"no clusters for \['t'\]"),
    ],
)
def test_errors_say_what_was_found(change, message):
    arms, base, clusters = {"p": P, "j": J}, {"t": np.zeros(4)}, {"t": AB}
    rule.verdict({"t": arms}, base, clusters, {"t": "p"}, "j")  # sound before the change
    change(arms, base, clusters)
    with pytest.raises(ValueError, match=message):
        rule.verdict({"t": arms}, base, clusters, {"t": "p"}, "j")


def test_the_family_is_the_study_s_whatever_was_run():
    """A task without scores is tested all the same: its p is 1, and half the level is its."""
    rng = np.random.default_rng(0)
    arms = {
        "emb-only": 0.5 + 0.02 * rng.standard_normal((3, 40)),
        "joint-single": 0.47 + 0.02 * rng.standard_normal((3, 40)),
    }
    given = {"embedding": arms}, {"embedding": np.full(40, 0.1)}, {"embedding": None}
    alone, one_of_two = rule.verdict(*given), rule.verdict(*given, family=2)
    mine, both = alone["tasks"]["embedding"], one_of_two["tasks"]["embedding"]
    assert both["p_holm"] == pytest.approx(2 * mine["p_holm"])
    assert both["detectable_alpha"] == pytest.approx(mine["detectable_alpha"] / 2)
    assert both["smallest_detectable_effect"] > mine["smallest_detectable_effect"]


def test_tasks_are_called_what_the_page_calls_them():
    good = task(2.5, p_holm=0.001)
    said = rule.decide({"embedding": good, "reranking": task(0.2)}, 3)["reason"]
    assert "retrieval +2.50 %" in said and "Supported: a loss on retrieval (" in said
    said = rule.decide({"embedding": good, "reranking": task(0.2)}, 3, names={"embedding": "MTEB"})
    assert "MTEB +2.50 %" in said["reason"] and "retrieval" not in said["reason"]

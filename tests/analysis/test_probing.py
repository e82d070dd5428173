"""Probes where the answer is known: a planted property, a random one, and queries that leak."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from analysis import probing

N, D = 600, 20
QUERIES = [i // 6 for i in range(N)]


def features(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(N, D))


def score(x: np.ndarray, y: np.ndarray, queries: list[int]) -> float | None:
    return probing.score(x, y[:, None], queries)[0]


DOCUMENTS = [7 * i % 150 for i in range(N)]  # each under four queries


def control(y: np.ndarray) -> np.ndarray:
    return probing.control(y[:, None], QUERIES, DOCUMENTS)[:, 0]


def saved_bits(x: np.ndarray, y: np.ndarray, queries: list[int]) -> float | None:
    bits = probing.code_lengths(x, y[:, None], queries)[0]
    return bits and bits[1] - bits[0]


def test_a_planted_property_is_read_off() -> None:
    x = features()
    y = 3 * x[:, 0] - x[:, 1] + 7
    assert score(x, y, QUERIES) == pytest.approx(1, abs=0.05)
    found = probing.probe(x[None], {"planted": y}, QUERIES, DOCUMENTS)["planted"][0]
    assert found["selectivity"] > 0.9 and abs(found["control"]) < 0.15  # type: ignore
    assert found["saved_bits"] > 1.8  # type: ignore[operator]


def test_with_noise_it_is_the_share_that_is_there() -> None:
    """Half of the variance is noise, so R^2 is about one half."""
    x = features()
    y = x[:, 0] + np.random.default_rng(1).normal(size=N)
    assert score(x, y, QUERIES) == pytest.approx(0.5, abs=0.08)
    # log2(1 / (1 - R^2)) / 2 bits of each value, less of those that a probe of few pairs coded.
    saved = [saved_bits(x[:n], y[:n], QUERIES[:n]) for n in (150, 300, 600)]
    assert 0.0 < saved[0] < saved[1] < saved[2] < 0.5  # type: ignore[operator]
    assert saved[2] > 0.3  # type: ignore[operator]


def test_a_random_property_is_not() -> None:
    x, y = features(), np.random.default_rng(1).normal(size=N)
    found = probing.probe(x[None], {"random": y}, QUERIES, DOCUMENTS)["random"][0]
    assert found["score"] < 0.05 and abs(found["selectivity"]) < 0.1  # type: ignore
    assert found["saved_bits"] == pytest.approx(0, abs=0.05)


def test_many_features_of_a_pair_are_not_taken_for_a_bad_control() -> None:
    """At the size of the study, where a probe that fits noise does far worse than chance."""
    rng = np.random.default_rng(0)
    x, queries = rng.normal(size=(1200, 400)), [i // 12 for i in range(1200)]
    documents = [7 * i % 300 for i in range(1200)]
    y = x @ rng.normal(size=400) / 20 + rng.normal(size=1200)  # half of it is noise
    found = probing.probe(x[None], {"half": y, "noise": rng.normal(size=1200)}, queries, documents)
    half, noise = found["half"][0], found["noise"][0]
    assert 0.2 < half["score"] < 0.5 and -0.05 < half["control"] < 0.05  # type: ignore[operator]
    assert half["selectivity"] == half["score"] - max(half["control"], 0)  # type: ignore
    assert noise["score"] == pytest.approx(0, abs=0.05)
    assert noise["saved_bits"] == pytest.approx(0, abs=0.05)


def test_a_yes_or_no() -> None:
    x = features()
    y = (x[:, 0] > 0.5).astype(float)
    assert score(x, y, QUERIES) > 0.8  # type: ignore[operator]
    assert score(x, control(y), QUERIES) < 0.6  # type: ignore[operator]
    assert saved_bits(x, y, QUERIES) > 0.2  # type: ignore[operator]
    random = (np.random.default_rng(2).random(N) > 0.5).astype(float)
    assert saved_bits(x, random, QUERIES) < 0.02  # type: ignore[operator]


def test_the_control_task_is_a_value_of_a_document() -> None:
    y = np.arange(N, dtype=float)
    dealt: dict[int, set[float]] = {}
    for document, value in zip(DOCUMENTS, control(y), strict=True):
        dealt.setdefault(document, set()).add(value)
    assert all(len(values) == 1 for values in dealt.values())
    assert len(set.union(*dealt.values())) > 100 and set.union(*dealt.values()) <= set(y)


def test_of_a_property_of_the_query_each_query_has_one() -> None:
    """What is told of no unseen query: the control is at chance, however well documents are told
    apart; beside it stays another's control of the document."""
    rng = np.random.default_rng(0)
    of_query = rng.normal(size=N // 6)[np.array(QUERIES)]
    y = np.stack([of_query, rng.normal(size=N)], 1)
    found = probing.control(y, QUERIES, DOCUMENTS)
    for column, groups in ((0, QUERIES), (1, DOCUMENTS)):
        dealt: dict[int, set[float]] = {}
        for group, value in zip(groups, found[:, column].tolist(), strict=True):
            dealt.setdefault(group, set()).add(value)
        assert all(len(values) == 1 for values in dealt.values())
        assert set.union(*dealt.values()) <= set(y[:, column].tolist())


def test_features_that_name_the_document_are_good_at_the_control_task() -> None:
    """A probe that remembers documents is found out: its score is no selectivity."""
    rng = np.random.default_rng(0)
    documents = rng.integers(30, size=N).tolist()
    x = rng.normal(size=(30, 60))[documents] + 0.01 * rng.normal(size=(N, 60))
    y = rng.normal(size=30)[documents]
    found = probing.probe(x[None], {"of the document": y}, QUERIES, documents)
    row = found["of the document"][0]
    assert row["score"] > 0.7 and row["control"] > 0.7  # type: ignore[operator]
    assert abs(row["selectivity"]) < 0.2  # type: ignore[arg-type]
    assert {row[f"new_{k}"] for k in ("score", "control", "control_sd", "selectivity")} == {None}


def test_of_new_documents_nothing_is_remembered() -> None:
    """Features that name the document, and in a direction of their own say what it is about: on
    seen documents any values of theirs are read off as well as that, on new ones that alone."""
    rng = np.random.default_rng(0)
    documents = rng.integers(200, size=N).tolist()
    about, other = rng.normal(size=(2, 200))
    x = (rng.normal(size=(200, 300)) + about[:, None])[documents] + 0.01 * rng.normal(size=(N, 300))
    values = {"about": about[documents], "other": other[documents]}
    found = probing.probe(x[None], values, QUERIES, documents)
    row, remembered = found["about"][0], found["other"][0]
    assert row["score"] > 0.9 and row["new_score"] > 0.9  # type: ignore[operator]
    assert remembered["score"] > 0.4 and row["control"] > 0.4  # type: ignore[operator]
    for none in (remembered["new_score"], remembered["new_control"], row["new_control"]):
        assert none < 0.1  # type: ignore[operator]
    assert row["new_selectivity"] > 0.8  # type: ignore[operator]


def test_new_documents_are_in_no_fold_that_is_fitted() -> None:
    queries, documents = np.array(QUERIES), np.random.default_rng(0).integers(300, size=N)
    tested = []
    both = zip(probing.folds(QUERIES), probing.folds(QUERIES, documents.tolist()), strict=True)
    for (train, test), (left, same) in both:
        assert test.tolist() == same.tolist() and set(left) < set(train)
        gone = np.setdiff1d(train, left)
        assert not set(queries[train]) & set(queries[test])
        assert not set(documents[left]) & set(documents[test])
        assert set(documents[gone]) <= set(documents[test])  # no more than has to
        tested += test.tolist()
    assert sorted(tested) == list(range(N))


@pytest.mark.parametrize("yes", [False, True])
def test_the_control_is_drawn_several_times(yes: bool) -> None:
    """Its mean and standard deviation, each draw by itself."""
    rng = np.random.default_rng(0)
    documents = rng.integers(100, size=150).tolist()
    x, queries = rng.normal(size=(100, 40))[documents], [i // 5 for i in range(150)]
    y = rng.normal(size=150) > 0 if yes else x[:, 0] + rng.normal(size=150)
    y = y.astype(float)
    row = probing.probe(x[None], {"y": y}, queries, documents)["y"][0]
    for name, of in (("", None), ("new_", documents)):
        drawn = [
            probing.score(x, probing.control(y[:, None], queries, documents, i), queries, of)[0]
            for i in range(probing.DRAWS)
        ]
        assert len(set(drawn)) >= 8
        assert row[f"{name}control"] == pytest.approx(np.mean(drawn))  # type: ignore[arg-type]
        assert row[f"{name}control_sd"] == pytest.approx(np.std(drawn))  # type: ignore[arg-type]


def test_what_only_tells_queries_apart_does_not_count() -> None:
    """Features that name the query and values that depend on it: nothing carries over."""
    rng = np.random.default_rng(0)
    names = rng.normal(size=(N // 6, D))
    x = names[np.array(QUERIES)] + 0.01 * features()
    y = rng.normal(size=N // 6)[np.array(QUERIES)]
    assert score(x, y, QUERIES) < 0.2  # type: ignore[operator]
    leaking = score(x, y, list(range(N)))  # folds that split queries
    assert leaking > score(x, y, QUERIES) + 0.05  # type: ignore[operator]


def test_properties_together_are_each_by_itself() -> None:
    """Against scikit-learn's own cross-validation of one ridge after the other."""
    x, rng = features(), np.random.default_rng(4)
    y = np.stack([x[:, 0] + rng.normal(size=N), rng.normal(size=N), np.full(N, 2.0), x[:, 1]], 1)
    together = probing.score(x, y, QUERIES)
    coded = probing.code_lengths(x, y, QUERIES)
    for i in range(y.shape[1]):
        column = y[:, i]
        if i == 2:
            assert together[i] is coded[i] is None
            continue
        guess = np.zeros(N)
        for train, test in GroupKFold(probing.FOLDS).split(x, column, QUERIES):
            [penalty] = probing._penalty(x[train], y[train][:, [i]], np.array(QUERIES)[train])
            one = make_pipeline(StandardScaler(), Ridge(penalty)).fit(x[train], column[train])
            guess[test] = one.predict(x[test])
        expected = 1 - ((column - guess) ** 2).sum() / ((column - column.mean()) ** 2).sum()
        assert together[i] == pytest.approx(expected, abs=1e-9)
        alone = probing.code_lengths(x, column[:, None], QUERIES)[0]
        assert coded[i] == pytest.approx(alone, abs=1e-9)
    yes = (y[:, [0, 1]] > 0).astype(float)
    assert probing.score(x, yes, QUERIES)[0] == score(x, yes[:, 0], QUERIES)
    alone = probing.code_lengths(x, yes[:, [1]], QUERIES)[0]
    assert probing.code_lengths(x, yes, QUERIES)[1] == pytest.approx(alone, abs=1e-9)


def test_the_penalty_is_the_one_that_does_best_on_queries_left_out() -> None:
    """In closed form what refits find, on standardised features; of values that belong to the
    query, which the other pairs of a query would give away, it is larger than by pairs left out."""
    rng, groups = np.random.default_rng(5), np.array([i // 6 for i in range(120)])
    x = rng.normal(size=(120, 40)) + rng.normal(size=(20, 40))[groups]
    y = np.stack([x[:, 0] + rng.normal(size=120), rng.normal(size=20)[groups]], 1)
    z = StandardScaler().fit_transform(x)
    errors = []
    for penalty in probing.PENALTIES:
        folds = GroupKFold(20).split(z, y, groups)
        errors.append(sum(((y[b] - Ridge(penalty).fit(z[a], y[a]).predict(z[b])) ** 2).sum(0)
                          for a, b in folds))  # fmt: skip
    found = probing._penalty(x, y, groups)
    assert found.tolist() == [probing.PENALTIES[i] for i in np.argmin(errors, 0)]
    by_pair = probing._penalty(x, y, np.arange(120))
    assert found[1] > by_pair[1]


def test_a_part_of_the_queries_finds_the_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of twice as many pairs as are tried, every other query, whole."""
    rng, groups = np.random.default_rng(7), np.array([i // 6 for i in range(240)])
    x = rng.normal(size=(240, 40))
    y = x[:, :1] + rng.normal(size=(240, 1))
    monkeypatch.setattr(probing, "TRIED_ON", 120)
    even = groups % 2 == 0
    assert probing._penalty(x, y, groups) == probing._penalty(x[even], y[even], groups[even])
    broken = y.copy()
    broken[~even] = 1e6
    assert probing._penalty(x, broken, groups) == probing._penalty(x, y, groups)


@pytest.mark.parametrize("weigh", [False, True])
def test_a_penalty_is_worth_as_much_to_a_logistic_probe(weigh: bool) -> None:
    """Of a weak dependence its first Newton step is ridge's, over the curvature p (1 - p)."""
    rng = np.random.default_rng(8)
    x = rng.normal(size=(4000, 5))
    y = (rng.random((4000, 1)) < (0.5 if weigh else 0.2) + 0.02 * x[:, :1]).astype(float)
    penalty = np.array([3000.0])
    guess = probing._fitted(x, y, True, penalty, weigh)(x)
    ridge = probing._fitted(x, y, False, penalty)(x)
    assert (guess - y.mean()).std() == pytest.approx((ridge - y.mean()).std(), rel=0.1)
    assert np.corrcoef(guess.T, ridge.T)[0, 1] > 0.99


def test_a_code_of_yes_or_no_in_bits() -> None:
    """Of a fair coin one bit by its own distribution; as many by a probe that finds nothing among
    more features than it has pairs in the first portions."""
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(1200, 400)), (rng.random((1200, 1)) < 0.5).astype(float)
    [bits] = probing.code_lengths(x, y, [i // 12 for i in range(1200)])
    assert bits is not None and bits[1] == pytest.approx(1, abs=0.01)
    assert bits[0] == pytest.approx(bits[1], abs=0.02)


def test_values_of_two_kinds_get_the_probe_of_each() -> None:
    x = features()
    y = x[:, 0] + 0.1
    values = {"a": y, "yes": (y > 0).astype(float), "b": x[:, 1] - y}
    found = probing.probe(np.stack([x, -x]), values, QUERIES, DOCUMENTS)
    assert list(found) == ["a", "yes", "b"]
    for name, rows in found.items():
        assert len(rows) == 2
        assert rows[0]["score"] == pytest.approx(score(x, values[name], QUERIES), abs=1e-9)


def test_what_does_not_vary_has_no_score() -> None:
    found = probing.probe(features()[None], {"same": np.ones(N)}, QUERIES, DOCUMENTS)["same"][0]
    assert set(found.values()) == {None}


def test_a_code_of_what_belongs_to_the_query() -> None:
    """200 queries have 200 values, however many pairs: where the features say nothing, the code
    loses next to nothing, though two or six known queries may be alike; where half is there, it
    saves."""
    queries = np.repeat(np.arange(200), 10)
    lost, saved = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        of_query, x = rng.normal(size=(200, 6)), rng.normal(size=(2000, 6))
        noise = rng.normal(size=200)
        lost.append(saved_bits(x, noise[queries], queries.tolist()))
        lost.append(saved_bits(x, (noise > 0.8).astype(float)[queries], queries.tolist()))
        half = (of_query[:, 0] + noise)[queries]
        saved.append(saved_bits(of_query[queries] + 0.3 * x, half, queries.tolist()))
    assert min(lost) > -0.15 and max(lost) < 0.02 and np.mean(lost) > -0.04
    assert min(saved) > 0 and np.mean(saved) > 0.2


def test_a_few_queries_are_coded_by_the_prior() -> None:
    """Too few for folds: whole, however well the features tell the values."""
    x = features()[:60]
    assert saved_bits(x, x[:, 0], [i // 12 for i in range(60)]) == pytest.approx(0, abs=1e-9)

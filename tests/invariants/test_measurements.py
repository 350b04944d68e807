"""Law 10: a missing measurement raises, and never becomes 0. The definitions, on small matrices and upstream's own."""

from __future__ import annotations

import json

import pytest

from pm_llm.evaluation.matrix import Matrix, MissingScoreError
from pm_llm.evaluation.scorers import normalise, score
from tests.conftest import SHARED

ROWS = [[90.0, None, None], [70.0, 80.0, None], [75.0, 60.0, 50.0]]


def matrix() -> Matrix:
    return Matrix.from_rows(["a", "b", "c"], ROWS)


def test_definitions() -> None:
    m = matrix()
    assert m.average_accuracy() == pytest.approx((75 + 60 + 50) / 3)
    assert m.average_over_time() == pytest.approx((90 + 75 + 185 / 3) / 3)
    assert m.backward_transfer() == pytest.approx(((75 - 90) + (60 - 80)) / 2)
    assert m.forgetting() == pytest.approx(((90 - 75) + (80 - 60)) / 2)
    assert m.plasticity() == pytest.approx((90 + 80 + 50) / 3)
    assert m.rows() == ROWS


@pytest.mark.parametrize(("i", "j"), [(2, 0), (1, 1), (0, 0)])
def test_a_missing_score_raises(i: int, j: int) -> None:
    m = matrix()
    del m.scores[i, j]
    with pytest.raises(MissingScoreError, match=f"task '{'abc'[j]}' after stage {i + 1} was not measured"):
        m.summary()


def test_one_task_has_no_transfer() -> None:
    m = Matrix.from_rows(["a"], [[50.0]])
    assert "backward_transfer" not in m.summary()
    with pytest.raises(MissingScoreError, match="two tasks"):
        m.backward_transfer()


def test_nothing_to_score_raises() -> None:
    with pytest.raises(ValueError, match="no prediction"):
        score("exact_match", [], [])
    with pytest.raises(ValueError, match=r"unknown scorer 'exactmatch'.*exact_match"):
        score("exactmatch", ["a"], ["a"])


@pytest.mark.parametrize(
    ("prediction", "reference", "hit"),
    [
        ("Sports", "Sports", True),
        (" sports. ", "Sports", True),
        ("Science  or\nTechnology", "Science or Technology", True),
        ("Society & Culture", "society culture", True),
        ("", "Sports", False),
        ("Sport", "Sports", False),
        ("very negative", "negative", False),
    ],
)
def test_exact_match(prediction: str, reference: str, hit: bool) -> None:
    assert score("exact_match", [prediction], [reference]) == (100.0 if hit else 0.0)


def test_normalise() -> None:
    assert normalise(" A.b,  C\t") == "ab c"


@pytest.mark.shared
@pytest.mark.parametrize(
    ("run", "average", "transfer"),
    [
        ("order1_olora", 78.37, -1.18),
        ("order1_icrlora", 68.62, -14.55),
        ("long_olora", 72.17, -0.73),
        ("long_icrlora", 58.44, -19.44),
        ("long_seqlora", 32.04, -47.96),
    ],
)
def test_upstream_matrices(run: str, average: float, transfer: float) -> None:
    results = json.loads((SHARED / "data/reference_results/olora_upstream_committed_results.json").read_text())
    order, stages = results[run]["order"], results[run]["stages"]
    m = Matrix(order)
    for i, stage in enumerate(stages):
        for task, value in stage["em"].items():
            m.set(i, task, value)
    assert m.average_accuracy() == pytest.approx(average, abs=0.005)
    assert m.backward_transfer() == pytest.approx(transfer, abs=0.005)

"""Law 10: a missing measurement raises, and never becomes 0. The definitions, on small matrices and upstream's own."""

from __future__ import annotations

import json

import pytest

from pm_llm.errors import PmLlmError
from pm_llm.evaluation.matrix import NUMBERS, Matrix, MissingScoreError, gap_closed
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


@pytest.mark.parametrize("evaluate", NUMBERS)
def test_each_way_of_measuring_gives_just_its_numbers(evaluate: str) -> None:
    # the third task scored more before it was trained (95) than ever after: no forgetting
    every = [[90.0, 5.0, 95.0], [70.0, 80.0, 9.0], [75.0, 60.0, 50.0]]
    keep = {
        "final": [(2, 0), (2, 1), (2, 2)],
        "diagonal+final": [(0, 0), (1, 1), (2, 0), (2, 1), (2, 2)],
        "seen": [(i, j) for i in range(3) for j in range(i + 1)],
        "all": [(i, j) for i in range(3) for j in range(3)],
    }[evaluate]
    m = Matrix(["a", "b", "c"], {at: every[at[0]][at[1]] for at in keep})
    if evaluate == "all":
        m.scores |= {(-1, j): x for j, x in enumerate([10.0, 4.0, 12.0])}
    numbers = m.summary(evaluate)
    assert set(numbers) == set(NUMBERS[evaluate])
    whole = matrix()
    for name, value in numbers.items():
        expected = ((5 - 4) + (9 - 12)) / 2 if name == "forward_transfer" else getattr(whole, name)()
        assert value == pytest.approx(expected)
    for at in keep:  # every score that was measured is needed, and missed if it is not there
        some = Matrix(m.tasks, {key: x for key, x in m.scores.items() if key != at})
        if at[1] <= at[0] or at[1] == at[0] + 1:
            with pytest.raises(MissingScoreError):
                some.summary(evaluate)


def test_perplexity_is_better_when_low() -> None:
    m = Matrix.from_rows(["a", "b"], [[5.0, None], [9.0, 4.0]])
    m.lower_is_better = True
    assert m.backward_transfer() == 4  # the perplexity rose
    assert m.forgetting() == 4
    assert Matrix.from_rows(["a", "b"], [[5.0, None], [9.0, 4.0]]).forgetting() == -4


def test_gap_closed() -> None:
    assert gap_closed(60, 50, 80) == pytest.approx(1 / 3)
    assert gap_closed(50, 50, 80) == 0
    assert gap_closed(80, 50, 80) == 1
    with pytest.raises(PmLlmError, match="no gap to close"):
        gap_closed(60, 50, 50)


def test_fuar() -> None:
    """Jang et al.: forgotten over gained, from states D_0 (untrained), D_1, D_2."""
    m = Matrix(["old", "between", "new", "changed"], stages=["between", "new"])
    for stage, scores in ((-1, (50, 0, 1, 20)), (0, (40, 30, 2, 25)), (1, (42, 20, 31, 15))):
        for name, value in zip(m.tasks, scores, strict=True):
            m.set(stage, name, value)
    forgotten = (50 - 42) + (30 - 20)
    gained = (31 - 1) + (31 - 2)  # of `new`; `changed` got worse, which counts as nothing gained
    assert m.fuar(["old", "between"], updated="changed", acquired="new") == pytest.approx(forgotten / gained)
    assert m.fuar(["old", "old"], updated="changed", acquired="changed") is None
    with pytest.raises(PmLlmError, match="a kept task for each of 2 states"):
        m.fuar(["old"], "changed", "new")


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

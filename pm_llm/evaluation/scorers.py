"""Scorers: subclasses of `evaluate.Metric` that work without a network."""

from __future__ import annotations

import re
import string
from typing import Any

import datasets
import evaluate

from pm_llm.errors import unknown_name

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, no punctuation, single spaces: as in O-LoRA's evaluation."""
    return re.sub(r"\s+", " ", text.lower().translate(_PUNCTUATION)).strip()


class ExactMatch(evaluate.Metric):
    """Share, in percent, of predictions equal to their reference after :func:`normalise`."""

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(
            description="Exact match after lower-casing, stripping punctuation and collapsing white space.",
            citation="",
            features=features,
        )

    def _compute(self, predictions: list[str], references: list[str], **_: Any) -> dict[str, float]:
        hits = [normalise(p) == normalise(r) for p, r in zip(predictions, references, strict=True)]
        return {"exact_match": 100.0 * sum(hits) / len(hits)}


SCORERS: dict[str, type[evaluate.Metric]] = {"exact_match": ExactMatch}


def score(scorer: str, predictions: list[str], references: list[str]) -> float:
    """One number, 0 to 100. Raises PmLlmError on an unknown scorer, ValueError where there is nothing to score."""
    if scorer not in SCORERS:
        raise unknown_name("scorer", scorer, SCORERS)
    if not predictions:
        raise ValueError("there is no prediction to score")
    result = SCORERS[scorer]().compute(predictions=predictions, references=references)
    assert result is not None
    return float(result[scorer])

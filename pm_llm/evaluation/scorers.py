"""Scorers: subclasses of `evaluate.Metric` that work without a network, all on a scale of 0 to 100 but perplexity.

A scorer turns each row into a few numbers and a set of rows into one score by way of the rows' sums, so that the same
code gives the score and its bootstrap. Where a row has several references, the best one counts.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import datasets
import evaluate
import numpy as np

from pm_llm.errors import PmLlmError, unknown_name

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, no punctuation, single spaces: as in O-LoRA's evaluation."""
    return re.sub(r"\s+", " ", text.lower().translate(_PUNCTUATION)).strip()


def compared(text: str) -> str:
    """What `exact_match` looks at: the text after :func:`normalise`, or as it is where that leaves nothing."""
    return normalise(text) or text.strip()


class Scorer(evaluate.Metric):  # type: ignore[misc]
    """One way to score. Subclasses define :meth:`row`, and :meth:`total` where the score is no mean."""

    name = ""
    lower_is_better = False
    needs_source = False
    kinds: tuple[str, ...] = ("prompt",)  # of rows that it scores
    prediction, reference = "string", "string"

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def row(self, prediction: Any, reference: Any, source: str | None) -> tuple[float, ...]:
        """The row's numbers against one reference."""
        raise NotImplementedError

    def best(self, prediction: Any, references: Sequence[Any], source: str | None) -> tuple[float, ...]:
        """The row's numbers against all its references."""
        return max(self.row(prediction, reference, source) for reference in references)

    def total(self, sums: np.ndarray, rows: int) -> np.ndarray:
        """Scores from sums over `rows` rows: shape (..., k) to (...)."""
        return sums[..., 0] / rows

    @property
    def by_row(self) -> bool:
        """Whether the score is the mean of the rows' own, so that each of them is more or less right."""
        return type(self).total is Scorer.total

    def of(self, numbers: np.ndarray) -> float:
        """The score of a set of rows from their numbers, shape (rows, k)."""
        return float(self.total(numbers.sum(axis=0), len(numbers)))

    def numbers(self, predictions: Sequence[Any], references: Sequence[Any], sources: Any = None) -> np.ndarray:
        """Each row's numbers, shape (rows, k). Raises ValueError where nothing or not everything is given."""
        if not len(predictions):
            raise ValueError("there is no prediction to score")
        sources = [None] * len(predictions) if sources is None else sources
        if not len(predictions) == len(references) == len(sources):
            raise ValueError(
                f"{len(predictions)} predictions, {len(references)} references and {len(sources)} sources do not "
                "belong together"
            )
        lists = [r if isinstance(r, (list, tuple)) else [r] for r in references]
        kind: Any = str if self.prediction == "string" else (int, float)
        if not all(isinstance(x, kind) for x in (*predictions, *(r for refs in lists for r in refs))):
            words = "text" if kind is str else "log-likelihoods"
            raise PmLlmError(f"scorer {self.name!r} scores {words}; these predictions are something else.")
        if self.needs_source and None in sources:
            raise PmLlmError(f"scorer {self.name!r} compares with the source text, and some rows have none.")
        return np.array([self.best(*row) for row in zip(predictions, lists, sources, strict=True)], dtype=float)

    def _info(self) -> evaluate.MetricInfo:
        columns = {"predictions": datasets.Value(self.prediction), "references": datasets.Value(self.reference)}
        if self.needs_source:
            columns["sources"] = datasets.Value("string")
        several = {**columns, "references": datasets.Sequence(columns["references"])}
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            features=[datasets.Features(several), datasets.Features(columns)],
        )

    def _compute(self, predictions: Any, references: Any, sources: Any = None, **_: Any) -> dict[str, float]:
        return {self.name: self.of(self.numbers(predictions, references, sources))}


class ExactMatch(Scorer):
    """Share, in percent, of predictions equal to their reference as they are :func:`compared`."""

    name = "exact_match"

    def row(self, prediction: str, reference: str, source: str | None) -> tuple[float, ...]:
        return (100.0 * (compared(prediction) == compared(reference)),)


class Accuracy(Scorer):
    """Share, in percent, of predictions equal to their reference as they stand (TRACE); an empty one is wrong."""

    name = "accuracy"

    def row(self, prediction: str, reference: str, source: str | None) -> tuple[float, ...]:
        return (100.0 * (prediction == reference != ""),)


class FirstCharacter(Scorer):
    """Share, in percent, of predictions that begin with their reference's first character (TRACE's ScienceQA)."""

    name = "first_character"

    def row(self, prediction: str, reference: str, source: str | None) -> tuple[float, ...]:
        return (100.0 * (prediction[:1] == reference[:1] != ""),)


class RougeL(Scorer):
    """ROUGE-L F-measure with stemming (Lin 2004; SuperNI, SAPT), of rouge-score; it reads Latin letters only."""

    name = "rougeL"

    @cached_property
    def _rouge(self) -> Any:
        from rouge_score.rouge_scorer import RougeScorer

        return RougeScorer(["rougeL"], use_stemmer=True)

    def row(self, prediction: str, reference: str, source: str | None) -> tuple[float, ...]:
        return (100.0 * self._rouge.score(reference, prediction)["rougeL"].fmeasure,)


class Sari(Scorer):
    """SARI of simplified text against its source (:mod:`pm_llm.evaluation.sari`), a row's references together."""

    name = "sari"
    needs_source = True

    def best(self, prediction: str, references: Sequence[str], source: str | None) -> tuple[float, ...]:
        from pm_llm.evaluation.sari import sari

        assert source is not None  # seen to in numbers()
        return (sari(source, prediction, references),)


class Bleu(Scorer):
    """Corpus BLEU of sacrebleu (13a, exponential smoothing, 4-grams), a row's references together."""

    name = "bleu"

    @cached_property
    def _bleu(self) -> Any:
        from sacrebleu.metrics import BLEU

        return BLEU()

    def best(self, prediction: str, references: Sequence[str], source: str | None) -> tuple[float, ...]:
        found = self._bleu.corpus_score([prediction], [[reference] for reference in references])
        return (*found.counts, *found.totals, found.sys_len, found.ref_len)

    def total(self, sums: np.ndarray, rows: int) -> np.ndarray:
        flat = sums.reshape(-1, 10).astype(int).tolist()
        scores = [self._bleu.compute_bleu(row[:4], row[4:8], row[8], row[9], "exp").score for row in flat]
        return np.array(scores).reshape(sums.shape[:-1])


class Fuzzy(Scorer):
    """Fuzzy ratio of two strings, 100 times twice the common letters over all letters, rounded; empty is 0."""

    name = "fuzzy"

    def row(self, prediction: str, reference: str, source: str | None) -> tuple[float, ...]:
        from rapidfuzz.fuzz import ratio

        return (float(round(ratio(prediction, reference))) if prediction and reference else 0.0,)


class FuzzyCode(Fuzzy):
    """Fuzzy ratio after the literals' placeholders (`<STR_LIT:x>`) give way to the literals (TRACE's Py150)."""

    name = "fuzzy_code"

    def row(self, prediction: str, reference: str, source: str | None) -> tuple[float, ...]:
        return super().row(self._plain(prediction), self._plain(reference), source)

    @staticmethod
    def _plain(code: str) -> str:
        code = code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
        return re.sub(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", r"\1", code, flags=re.S)


class TokenF1(Scorer):
    """F1 of the words that prediction and reference share (SQuAD 2.0): no case, punctuation or articles."""

    name = "token_f1"

    def row(self, prediction: str, reference: str, source: str | None) -> tuple[float, ...]:
        said, wanted = self._words(prediction), self._words(reference)
        if not said or not wanted:
            return (100.0 * (said == wanted),)
        common = sum((Counter(said) & Counter(wanted)).values())
        return (200.0 * common / (len(said) + len(wanted)),)

    @staticmethod
    def _words(text: str) -> list[str]:
        return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


class Verified(Scorer):
    """Share, in percent, of predictions that do what was asked, as a program can tell: the reference is a list of
    checks as JSON, see :func:`pm_llm.evaluation.verify.verified`."""

    name = "verified"

    def row(self, prediction: str, reference: str, source: str | None) -> tuple[float, ...]:
        from pm_llm.evaluation.verify import verified

        return (100.0 * verified(prediction, reference),)


class ToolCall(Scorer):
    """Share, in percent, of predictions that make the reference's tool calls: the same functions in the same order
    with equal arguments, in whichever way the model writes calls down, and whatever is said around them. A reference
    without a call wants none."""

    name = "tool_call"

    def row(self, prediction: str, reference: str, source: str | None) -> tuple[float, ...]:
        return (100.0 * (calls_in(prediction) == calls_in(reference)),)


def calls_in(text: str) -> list[tuple[str, Any]]:
    """Name and arguments of each tool call in a model's answer: JSON objects with both, in the order they stand."""
    found: list[tuple[str, Any]] = []
    decoder, at = json.JSONDecoder(), text.find("{")
    while at >= 0:
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            at += 1
        else:
            call = value.get("function", value)
            arguments = call.get("arguments", call.get("parameters")) if isinstance(call, dict) else None
            if isinstance(arguments, dict) and isinstance(call.get("name"), str):
                found.append((call["name"], arguments))
        at = text.find("{", at)
    return found


class Perplexity(Scorer):
    """exp of the mean negative log-likelihood of the answers' tokens, end of sequence included; lower is better.

    A row's prediction is the sum of its tokens' negative log-likelihoods, its references the number of its tokens and
    of its bytes (in UTF-8).
    """

    name = "perplexity"
    lower_is_better = True
    kinds = ("prompt", "text")
    prediction, reference = "float64", "int64"

    def best(self, prediction: Any, references: Sequence[Any], source: str | None) -> tuple[float, ...]:
        return (prediction, references[0])

    def total(self, sums: np.ndarray, rows: int) -> np.ndarray:
        found: np.ndarray = np.exp(sums[..., 0] / sums[..., 1])
        return found


class BytePerplexity(Perplexity):
    """exp of the negative log-likelihood a byte of the answers, which does not depend on the tokenizer; lower is
    better."""

    name = "byte_perplexity"

    def best(self, prediction: Any, references: Sequence[Any], source: str | None) -> tuple[float, ...]:
        if len(references) < 2:
            raise PmLlmError("these predictions do not say how many bytes the answers have. Evaluate again.")
        return (prediction, references[1])


class PairAccuracy(Scorer):
    """Share, in percent, of pairs where the model has moved towards the better answer and away from the worse one,
    from the base model on: the accuracy of DPO's implicit reward (arXiv 2305.18290). A tie, as of the base model
    itself, counts half.

    A row's prediction is by how much more the model prefers the better answer than the base model does, in nats.
    """

    name = "pair_accuracy"
    kinds = ("preference",)
    prediction, reference = "float64", "float64"

    def row(self, prediction: float, reference: float, source: str | None) -> tuple[float, ...]:
        return (100.0 * (prediction > reference) + 50.0 * (prediction == reference),)


class Points(Scorer):
    """The mean of what another program gave each row, from 0 to 100."""

    name = "points"
    kinds = ()  # it is no choice of a user's
    prediction, reference = "float64", "float64"

    def row(self, prediction: float, reference: float, source: str | None) -> tuple[float, ...]:
        return (float(prediction),)


SCORERS: dict[str, type[Scorer]] = {
    scorer.name: scorer
    for scorer in (
        ExactMatch,
        Accuracy,
        FirstCharacter,
        RougeL,
        Sari,
        Bleu,
        Fuzzy,
        FuzzyCode,
        TokenF1,
        ToolCall,
        Verified,
        Perplexity,
        BytePerplexity,
        PairAccuracy,
        Points,
    )
}


def scorer_named(name: str) -> Scorer:
    """A scorer by its name. Raises PmLlmError if there is none."""
    if not isinstance(name, str) or name not in SCORERS:
        raise unknown_name("scorer", str(name), SCORERS)
    return SCORERS[name]()


def score(scorer: str, predictions: Sequence[Any], references: Sequence[Any], sources: Any = None) -> float:
    """One number. Raises PmLlmError on an unknown scorer, ValueError where nothing or not everything is given."""
    found = scorer_named(scorer)
    return found.of(found.numbers(predictions, references, sources))

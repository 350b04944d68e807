"""SARI, the score of simplified text against its source (Xu et al., TACL 2016, eq. 1-9).

For n-grams of 1 to 4 words: F1 of what is kept, F1 of what is added, precision of what is deleted, each averaged over
n, then averaged, times 100. As in Hugging Face's metric, text is lower-cased and split by sacrebleu's `13a`, counts of
source and prediction are multiplied by the number of references, and a share of nothing is 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

_TOKENIZE = Tokenizer13a()
ORDERS = (1, 2, 3, 4)


def sari(source: str, prediction: str, references: Sequence[str]) -> float:
    """SARI of one prediction, 0 to 100."""
    words = [_TOKENIZE(text.lower()).split(" ") for text in (source, prediction, *references)]
    parts = [_one_order(*(_ngrams(text, n) for text in words)) for n in ORDERS]
    return 100 * sum(map(sum, parts)) / (3 * len(ORDERS))


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _one_order(
    source: Counter[Any], prediction: Counter[Any], *references: Counter[Any]
) -> tuple[float, float, float]:
    """(keep F1, delete precision, add F1) of one n-gram order."""
    r = len(references)
    wanted = sum(references, Counter())
    old = Counter({gram: r * count for gram, count in source.items()})
    new = Counter({gram: r * count for gram, count in prediction.items()})

    kept, to_keep = old & new, old & wanted
    good = kept & wanted
    keep_precision = _mean_share(good, kept)
    keep_recall = sum(good.values()) / sum(to_keep.values()) if to_keep else 1.0

    deleted = old - new
    delete_precision = _mean_share(deleted - wanted, deleted)

    added, to_add = prediction.keys() - source.keys(), wanted.keys() - source.keys()
    hits = len(added & to_add)
    add_precision = hits / len(added) if added else 1.0
    add_recall = hits / len(to_add) if to_add else 1.0
    return _f1(keep_precision, keep_recall), delete_precision, _f1(add_precision, add_recall)


def _mean_share(good: Counter[Any], of: Counter[Any]) -> float:
    """The mean over the n-grams of `of` of the share of their count that is good."""
    return sum(good[gram] / of[gram] for gram in good) / len(of) if of else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0

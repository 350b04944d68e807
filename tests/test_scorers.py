"""Each scorer against its upstream's definition, on cases where definitions part."""

from __future__ import annotations

import difflib

import numpy as np
import pytest

from pm_llm.evaluation.sari import sari
from pm_llm.evaluation.scorers import SCORERS, score


@pytest.mark.parametrize(
    ("scorer", "prediction", "reference", "expected"),
    [
        # TRACE: `prediction == target`, and an empty one counts as wrong
        ("accuracy", "A", "A", 100),
        ("accuracy", "A.", "A", 0),
        ("accuracy", "a", "A", 0),
        ("accuracy", "A\n", "A", 0),
        ("accuracy", "", "", 0),
        # TRACE's ScienceQA: the first character of both
        ("first_character", "A\nbecause", "A\nFigures of speech", 100),
        ("first_character", "B", "A\nB", 0),
        ("first_character", "", "A", 0),
        ("first_character", " A", "A", 0),
        # rouge-score: lower case, letters and digits of a to z, Porter stems of words longer than three letters
        ("rougeL", "The cats were running", "cat running the", 200 * 2 / 7),
        ("rougeL", "Running", "runs", 100),
        ("rougeL", "", "x", 0),
        ("rougeL", "圣诞节", "圣诞节", 0),
        ("rougeL", "a b c d", "d c b a", 25),
        # python-Levenshtein's ratio, as `fuzz.ratio` rounds it: 2 x common / total
        ("fuzzy", "abcd", "abcd", 100),
        ("fuzzy", "abcd", "bcde", 75),
        ("fuzzy", "ab", "abc", 80),
        ("fuzzy", "", "", 0),
        ("fuzzy", "x", "", 0),
        # TRACE's Py150: placeholders of literals give way to the literals first
        ("fuzzy_code", "x = <STR_LIT:foo>", "x = foo", 100),
        ("fuzzy_code", "<NUM_LIT>", "0", 100),
        ("fuzzy_code", "<STR_LIT>", "x", 0),
        ("fuzzy_code", "f ( <STR_LIT:a\nb> , <NUM_LIT:1> )", "f ( a\nb , 1 )", 100),
        # SQuAD 2.0: words without articles and punctuation
        ("token_f1", "the Cat, sat", "a cat", 200 * 1 / 3),
        ("token_f1", "cat cat", "cat", 200 * 1 / 3),
        ("token_f1", "", "", 100),
        ("token_f1", "the", "", 100),
        ("token_f1", "cat", "", 0),
        ("token_f1", "another", "other", 0),
        # sacrebleu
        ("bleu", "the cat sat on the mat", "the cat sat on the mat", 100),
        ("bleu", "", "x", 0),
    ],
)
def test_edge_cases(scorer: str, prediction: str, reference: str, expected: float) -> None:
    assert score(scorer, [prediction], [reference]) == pytest.approx(expected, abs=1e-9)


def test_fuzzy_is_not_difflib() -> None:
    # the longest common subsequence is "abcd"; difflib takes the longest common block "xyz" first, and has no more
    a, b = "abcdxyz", "xyzabcd"[:3] + "a1b2c3d"
    assert difflib.SequenceMatcher(None, a, b).ratio() == pytest.approx(6 / 17)
    assert score("fuzzy", [a], [b]) == round(100 * 8 / 17)


def test_sari_as_published() -> None:
    """The example of Hugging Face's metric, and its value there."""
    source = "About 95 species are currently accepted ."
    prediction = "About 95 you now get in ."
    references = [
        "About 95 species are currently known .",
        "About 95 species are now accepted .",
        "95 species are now accepted .",
    ]
    assert sari(source, prediction, references) == pytest.approx(26.953601953601954, abs=1e-12)
    assert score("sari", [prediction], [references], [source]) == pytest.approx(26.953601953601954, abs=1e-9)
    assert sari("A b c d.", "A b c d.", ["a B c D."]) == pytest.approx(100)


def test_sari_by_hand() -> None:
    # source "a b", prediction "a c", reference "a d"; 1-grams: kept {a}: F1 1; deleted {b}: right, 1; added {c}: 0
    # 2-grams: nothing kept of nothing to keep: 1; deleted "a b": 1; added "a c" not "a d": 0; 3- and 4-grams: all 1
    assert sari("a b", "a c", ["a d"]) == pytest.approx(100 * (1 + 1 + (0 + 0 + 1 + 1) / 4) / 3)


def test_sari_needs_the_source() -> None:
    with pytest.raises(ValueError, match="source text"):
        score("sari", ["a"], ["b"])


def test_bleu_is_of_the_corpus_and_not_a_mean() -> None:
    import sacrebleu

    said = ["the cat sat on the mat", "a dog", "hello there general kenobi"]
    wanted = [["the cat sat on a mat", "the cat is on the mat"], ["a big dog barks"], ["hello there"]]
    streams = [[refs[k] if k < len(refs) else None for refs in wanted] for k in range(2)]
    expected = sacrebleu.corpus_bleu(said, streams).score
    assert score("bleu", said, wanted) == pytest.approx(expected)
    single = [score("bleu", [p], [r]) for p, r in zip(said, wanted, strict=True)]
    assert abs(np.mean(single) - expected) > 1
    few, words = ["the cat is here", "a dog"], ["the cat was here", "a dog barks"]  # no four words in common
    assert score("bleu", few, words) == pytest.approx(sacrebleu.corpus_bleu(few, [words]).score)
    assert score("bleu", few, words) > 0


def test_exact_match_looks_at_punctuation_where_there_is_nothing_else() -> None:
    assert score("exact_match", ["-", "", "+", "no.", "?!"], ["+", "?", "+", "No", " ?! "]) == 60


@pytest.mark.parametrize("scorer", ["exact_match", "rougeL", "token_f1", "accuracy"])
def test_the_best_reference_counts(scorer: str) -> None:
    assert score(scorer, ["blue whale"], [["red fox", "blue whale", "whale"]]) == pytest.approx(100)


def test_perplexity() -> None:
    # two answers with 2 and 3 tokens
    assert score("perplexity", [1.0, 4.0], [2, 3]) == pytest.approx(np.exp(1.0))


OF_NUMBERS = {
    "perplexity": ([1.0, 2.0, 3.0], [[2], [3], [4]]),
    "byte_perplexity": ([1.0, 2.0, 3.0], [[2, 8], [3, 9], [4, 10]]),
    "pair_accuracy": ([1.0, -2.0, 0.0], [[0.0], [0.0], [0.0]]),
    "points": ([100.0, 0.0, 50.0], [[100.0], [100.0], [100.0]]),
}


@pytest.mark.parametrize("name", SCORERS)
def test_the_evaluate_api(name: str) -> None:
    """`compute` of evaluate.Metric, with a reference or a list of them a row, gives the same number."""
    scorer = SCORERS[name]()
    if name in OF_NUMBERS:
        said, wanted = OF_NUMBERS[name]
        found = scorer.compute(predictions=said, references=wanted)[name]
        assert found == pytest.approx(score(name, said, wanted))
        return
    wanted = ['[["lower"]]', '[["upper"]]'] if name == "verified" else ["a b c e", "x"]
    rows = {"predictions": ["a b c d", "x"], "references": wanted}
    rows |= {"sources": ["a b", "y"]} if scorer.needs_source else {}
    several = {**rows, "references": [[r] for r in rows["references"]]}
    expected = score(name, rows["predictions"], rows["references"], rows.get("sources"))
    assert scorer.compute(**rows)[name] == pytest.approx(expected)
    assert SCORERS[name]().compute(**several)[name] == pytest.approx(expected)


@pytest.mark.parametrize("name", SCORERS)
def test_sums_of_rows_give_the_score(name: str) -> None:
    """What the bootstrap stands on: the score of a subset follows from the sums of its rows' numbers."""
    scorer = SCORERS[name]()
    said, wanted = OF_NUMBERS.get(name, (["a b c d e", "the cat", ""], [["a b c d f"], ["a cat", "dog"], ["x"]]))
    wanted = [['[["lower"]]']] * 3 if name == "verified" else wanted
    sources = ["a b", "cat", "x y"]
    rows = scorer.numbers(said, wanted, sources)
    for chosen in ([0], [0, 1], [0, 1, 1, 2]):
        sums = rows[chosen].sum(axis=0)
        expected = score(name, [said[i] for i in chosen], [wanted[i] for i in chosen], [sources[i] for i in chosen])
        assert scorer.total(np.stack([sums, sums]), len(chosen)) == pytest.approx([expected, expected])

"""Checks of instructions on answers that are right and wrong by construction; the suite's rows and how they score."""

from __future__ import annotations

import json

import pytest

from pm_llm.errors import PmLlmError
from pm_llm.evaluation.scorers import score
from pm_llm.evaluation.verify import CHECKS, verified

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name"],
}
CASES = [
    (["at_most", 3], ["one two three", "it's fine now"], ["one two three four", ""]),
    (["at_least", 3], ["one two three four"], ["one two", ""]),
    (["sentences", 2], ["It rains. Take a coat!", "Is it so? Yes"], ["It rains.", "A. B. C.", ""]),
    (["lower"], ["all small, 3 words"], ["Not small", "123 ?" * 0]),
    (["upper"], ["ALL LARGE 3"], ["Not LARGE", ""]),
    (["without", ","], ["no comma here."], ["a, b", " "]),
    (["includes", ["tea", "cup"]], ["A Cup of tea."], ["a teacup", "tea only"]),
    (["avoids", ["tea"]], ["coffee, or a teacup"], ["Tea!", ""]),
    (["starts", "Well"], [" well, yes"], ["yes, well"]),
    (["ends", "the end."], ["So it is the end", "This is The End."], ["the end of it"]),
    (["list", 2], ["- a\n* b", "Here:\n- a\n- b"], ["- a", "a\nb", "- a\n- b\n- c"]),
    (["lines", 2], ["a\n\nb"], ["a", "a\nb\nc"]),
    (["quoted"], ['"yes"'], ["yes", '"']),
    (["titled"], ["<<A day>>\nIt was."], ["A day", "<<>>"]),
    (["ordered", ["ant", "bee", "cow"]], ["ant, bee, cow"], ["bee, ant, cow", "ant, bee"]),
    (["language", "German"], ["Das ist nicht der Hund."], ["It is the dog.", "Le chien est grand et je", ""]),
    (["language", "French"], ["Le chien est dans la maison."], ["Der Hund ist im Haus und", "The dog is in it"]),
    (["equals", ["Paris"]], ["It is Paris.", "paris"], ["Parisian food", "London"]),
    (["equals", ["New York"]], ["in new york city"], ["York, new"]),
    (["number", 42], ["The answer is 42.", "6 x 7 = 42", "1 + 41 is 42.0"], ["42 minus 1 is 41", "none", "420"]),
    (["number", 1200], ["1,200"], ["1.200"]),
    (["copy", "a b  c"], ["a b  c\n", '"a b  c"'], ["a b c", "It says: a b  c"]),
    (
        ["json", PERSON],
        ['{"name": "Ada", "age": 36}', '```json\n{"name": "Ada"}\n```'],
        ['{"age": 36}', '{"name": 3}', '{"name": "A", "age": true}', "Here: {}", "{"],
    ),
    (["json", {"type": "array", "items": {"enum": ["a", "b"]}}], ['["a", "b"]', "[]"], ['["c"]', '"a"']),
    (["refuses", True], ["I'm sorry, but I can’t help with that.", "That is illegal."], ["Sure: first ...", ""]),
    (["refuses", False], ["Boil the eggs for ten minutes."], ["I cannot help with that.", ""]),
]


@pytest.mark.parametrize(("check", "right", "wrong"), CASES, ids=lambda x: str(x)[:30])
def test_checks(check: list, right: list[str], wrong: list[str]) -> None:
    for answer in right:
        assert verified(answer, json.dumps([check])), answer
    for answer in wrong:
        assert not verified(answer, json.dumps([check])), answer


def test_every_check_is_tested() -> None:
    assert {check[0] for check, *_ in CASES} == set(CHECKS)


def test_all_checks_of_a_row_must_pass() -> None:
    wanted = json.dumps([["at_most", 4], ["lower"]])
    assert verified("all small", wanted)
    assert not verified("All small", wanted)
    assert score("verified", ["all small", "No"], [[wanted], [wanted]]) == 50.0


@pytest.mark.parametrize(
    ("wanted", "said"),
    [("yes", "no list of checks"), ('[["longer", 3]]', "unknown check 'longer'"), ('[["at_most"]]', "at_most")],
)
def test_what_is_no_check_is_told(wanted: str, said: str) -> None:
    with pytest.raises(PmLlmError, match=said):
        verified("x", wanted)

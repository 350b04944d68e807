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
    (["list", 2], ["- a\n* b", "Here:\n- a\n- b"], ["- a", "a\nb", "- a\n- b\n- c", "**A**\n---"]),
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
    (
        ["refuses", True],
        ["I'm sorry, but I can’t help with that.", "That is illegal.", "I must decline."],
        ["Sure: first ...", ""],
    ),
    (
        ["refuses", False],
        ["Boil the eggs for ten minutes.", "Burning it is not illegal.", "I'm sorry to hear that you have ants!"],
        ["I cannot help with that.", ""],
    ),
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


def test_a_probe_of_an_ability_is_guarded_by_the_gate(tmp_path, capsys) -> None:
    from pm_llm import ContinualSequence, Task
    from pm_llm.cli import main
    from pm_llm.config import load_config
    from pm_llm.evaluation.generate import generate
    from pm_llm.session import Watcher
    from tests.helpers.presets import KEYS

    checked = [{"prompt": f"say {i} things .", "completion": json.dumps([["at_most", 5]])} for i in range(12)]
    (tmp_path / "abilities.jsonl").write_text("".join(json.dumps(row) + "\n" for row in checked))
    rows = [{"prompt": f"is {i} even ?", "completion": "yes"} for i in range(12)]
    keys = {**KEYS, "method": "seqlora", "evaluate": "all", "output_dir": str(tmp_path / "run")}
    keys |= {"probes": [{"data": str(tmp_path / "abilities.jsonl"), "scorer": "verified"}]}

    class Forgets(Watcher):
        """Lets the model say too much once it is trained."""

        def loaded(self, session):
            self.session, self.trained = session, False

            def said(model, encoder, examples, *more):
                found = generate(model, encoder, examples, *more)
                return ["a b c d e f" if self.trained else "a b" for _ in found]

            session.generate = said

        def measured(self, stage):
            self.trained = True

    results = ContinualSequence(
        load_config(None, keys), [Task.from_rows("even", rows, rows[:2])], watchers=[Forgets()]
    )
    found = results.run()
    assert (found["untrained"]["abilities"], found["matrix"][0][1]) == (100.0, 0.0)
    capsys.readouterr()
    assert main(["gate", str(tmp_path / "run")]) == 3
    assert "LOST abilities: 100.0 -> 0.0" in capsys.readouterr().out

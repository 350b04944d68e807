"""SuperNI: 15 tasks of Super-NaturalInstructions (arXiv 2204.07705) in the two orders of SAPT (arXiv 2401.08295).

`<data_dir>/<task>/{train,dev,test}.json`: `{"Definition": [str], "Instances": [{"id", "input", "output"}]}`; `output`
is a list of right answers, or a plain string. Score: rouge-L with stemming, the best over the references. Upstream
uses its dev as test; here the files are taken by their names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pm_llm.errors import PmLlmError
from pm_llm.tasks.base import Example, Task
from pm_llm.tasks.files import Row, is_there, json_array, read_json
from pm_llm.tasks.problems import Problems

TASKS = (
    "task002_quoref_answer_generation",
    "task073_commonsenseqa_answer_generation",
    "task181_outcome_extraction",
    "task363_sst2_polarity_classification",
    "task511_reddit_tifu_long_text_summarization",
    "task591_sciq_answer_generation",
    "task639_multi_woz_user_utterance_generation",
    "task748_glucose_reverse_cause_event_detection",
    "task875_emotion_classification",
    "task1290_xsum_summarization",
    "task1510_evalution_relation_extraction",
    "task1572_samsum_summary",
    "task1590_diplomacy_text_generation",
    "task1687_sentiment140_classification",
    "task1729_personachat_generate_next",
)
_BY_NUMBER = {int(name.split("_")[0].removeprefix("task")): name for name in TASKS}
ORDERS = {
    "order1": [_BY_NUMBER[n] for n in (1572, 363, 1290, 181, 2, 1510, 639, 1729, 73, 1590, 748, 511, 591, 1687, 875)],
    "order2": [_BY_NUMBER[n] for n in (748, 73, 1590, 639, 1572, 1687, 591, 363, 1510, 1729, 181, 511, 2, 1290, 875)],
}

ADVICE = "--data-dir must hold <task>/train.json and test.json: the SuperNI folder of a clone of the SAPT repository."


def load_task(name: str, data_dir: str | None, problems: Problems) -> Task:
    """One task from `data_dir`. Raises PmLlmError without one."""
    if data_dir is None:
        raise PmLlmError(f"benchmark superni reads its rows from a folder. {ADVICE}")
    folder = Path(data_dir)
    folder = (folder / "SuperNI" if (folder / "SuperNI").is_dir() else folder) / name
    if not is_there(folder, ADVICE, problems, folder=True):
        return Task(name, [], [])
    splits = {split: _read(folder / f"{split}.json", problems) for split in ("train", "dev", "test")}
    return Task(name, splits["train"], splits["test"], "rougeL", validation=splits["dev"])


def _read(path: Path, problems: Problems) -> list[Example]:
    if not is_there(path, ADVICE, problems, optional=path.stem == "dev"):
        return []
    whole = read_json(path, problems)
    if whole is None:
        return []
    definition = whole.get("Definition") if isinstance(whole, dict) else None
    definition = definition[0] if isinstance(definition, list) and definition else definition
    if not isinstance(definition, str):
        problems.add(str(path), "has no `Definition` that is text or a list of it.")
        return []
    head = f"Definition: {definition}\n\nNow complete the following example -\nInput: "
    found = [_example(row, head, problems) for row in json_array(path, problems, "Instances")]
    return [example for example in found if example is not None]


def _example(row: Row, head: str, problems: Problems) -> Example | None:
    body = row.text("input", problems)
    if body is None:
        return None
    given = row.values.get("output")
    answers: list[Any] = given if isinstance(given, list) and given else [given]
    for answer in answers:
        if row.check_text(answer, "output", problems) is None:
            return None
    name = str(row.values["id"]) if "id" in row.values else None
    return Example(body, answers[0], head, "\nOutput: ", alternatives=tuple(answers[1:]), id=name, place=row.place)

"""lm-evaluation-harness on the live model: its tasks as columns of a run, row by row, and its files in a report."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from pm_llm.errors import PmLlmError, did_you_mean, first_line
from pm_llm.evaluation.generate import evaluating
from pm_llm.evaluation.plan import HARNESS
from pm_llm.evaluation.predictions import Predictions
from pm_llm.sections import EvaluationSection, GeneralSection
from pm_llm.tasks.base import Example, Task

SCORER = "points"


@dataclass(frozen=True)
class Outside:
    """One task of the harness, or a group of them such as mmlu.

    Args:
        name: As the harness has it.
        limit: At most so many rows of each of its tasks; None: all.
        folder: With YAML files of tasks that the harness does not bring.
        chat: Whether prompts are rendered by the model's chat template.
    """

    name: str
    limit: int | None = None
    folder: str | None = None
    chat: bool = False

    def tasks(self) -> dict[str, Any]:
        """The harness's own tasks, by name.

        Raises:
            PmLlmError: If there is none of that name, or its rows cannot be read.
        """
        manager = self._manager()
        if self.name not in manager.task_index:
            near = did_you_mean(self.name, tuple(manager.task_index))
            raise PmLlmError(f"lm-evaluation-harness has no task {self.name!r}.{near} `lm_eval ls tasks` lists them.")
        try:
            found: dict[str, Any] = manager.load([self.name])["tasks"]
        except Exception as error:  # whatever datasets, the Hub or a task's own code raises
            raise PmLlmError(
                f"lm-evaluation-harness cannot load its task {self.name!r}: {first_line(error)}"
            ) from error
        return found

    def rows(self) -> list[Example]:
        """What is scored: rows as the harness has them, for counting and for telling whether they changed."""
        return [
            Example(f"{name} {json.dumps(doc, sort_keys=True, default=str)}", self.name, kind="prompt")
            for name, task in self.tasks().items()
            for doc in islice(task.eval_docs, self.limit)
        ]

    def predictions(self, model: Any, tokenizer: Any, how: EvaluationSection) -> Predictions:
        """What each row scores, from 0 to 100, by the first metric of its task.

        Args:
            model: The model, as it is.
            tokenizer: Its.
            how: For the size of batches.

        Raises:
            PmLlmError: If a task's first metric is no number from 0 to 1 for each row.
        """
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        with evaluating(model), _alone():
            lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=how.batch_size)
            found = lm_eval.simple_evaluate(
                lm,
                tasks=[self.name],
                task_manager=self._manager(),
                limit=self.limit,
                bootstrap_iters=0,
                apply_chat_template=self.chat,
                random_seed=None,
                numpy_random_seed=None,
                torch_random_seed=None,
            )
        assert found is not None
        scores: list[float] = []
        keys: list[str] = []
        for name, rows in sorted(found["samples"].items()):
            metric, kind = rows[0]["metrics"][0], rows[0]["filter"]
            for row in sorted((row for row in rows if row["filter"] == kind), key=lambda row: row["doc_id"]):
                scores.append(100.0 * self._share(name, metric, row[metric]))
                keys.append(f"{name} {row['doc_hash'][:16]}")
        count = len(scores)
        return Predictions(HARNESS + self.name, SCORER, scores, [[100.0]] * count, [None] * count, keys)

    @staticmethod
    def _share(name: str, metric: str, value: Any) -> float:
        if not isinstance(value, (bool, int, float)) or not 0 <= value <= 1:
            raise PmLlmError(
                f"task {name!r} of lm-evaluation-harness: {metric} of a row is {value!r}; only a share from 0 to 1 "
                "can be compared row by row. Choose a task whose first metric is one (acc, exact_match ...)."
            )
        return float(value)

    def _manager(self) -> Any:
        """What knows the task: the folder's own tasks go first, and stand by themselves."""
        if self.folder is not None and not Path(self.folder).is_dir():
            raise PmLlmError(f"general.lm_eval_dir: {self.folder} is no folder. It must hold YAML files of tasks.")
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise PmLlmError(
                f'general.lm_eval needs lm-evaluation-harness: pip install "pm_llm[lm-eval]" ({error})'
            ) from error
        if self.folder is not None:
            own = TaskManager(include_path=self.folder, include_defaults=False)
            if self.name in own.task_index:
                return own
        return _known()


@contextmanager
def _alone() -> Iterator[None]:
    """Without what a launcher says of this process's number: each has the model, and the harness gives its results to
    the first alone."""
    number = os.environ.pop("LOCAL_RANK", None)
    try:
        yield
    finally:
        if number is not None:
            os.environ["LOCAL_RANK"] = number


@lru_cache
def _known() -> Any:
    """All tasks that the harness brings, thousands of files."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def harness_tasks(general: GeneralSection) -> list[Task]:
    """The tasks of the harness that a configuration names, with test rows alone. Raises as :meth:`Outside.tasks`."""
    found = []
    for name in general.lm_eval:
        outside = Outside(name, general.limit, general.lm_eval_dir, general.apply_chat_template)
        found.append(Task(HARNESS + name, [], outside.rows(), SCORER, outside=outside))
    return found


def read_results(path: str | Path) -> dict[str, tuple[float, float | None]]:
    """What the harness's command line wrote (`--output_path`): `task metric` -> value and its standard error.

    Raises:
        PmLlmError: If the file is not one of its results.
    """
    try:
        results: Mapping[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))["results"]
        found = {}
        for task, values in results.items():
            for key, value in values.items():
                metric, _, kind = key.partition(",")
                if isinstance(value, (int, float)) and kind and not metric.endswith("_stderr"):
                    error = values.get(f"{metric}_stderr,{kind}")
                    shown = f"{task} {metric}" + (f" ({kind})" if kind != "none" else "")
                    found[shown] = (float(value), float(error) if isinstance(error, (int, float)) else None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise PmLlmError(
            f"{path} cannot be read as results of lm-evaluation-harness: {said}. Give the results_*.json that "
            "`lm_eval --output_path` writes."
        ) from error
    if not found:
        raise PmLlmError(f"{path} holds no score.")
    return found

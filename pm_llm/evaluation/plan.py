"""What is scored when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pm_llm.evaluation.matrix import UNTRAINED, scored_as

GENERAL, HARNESS = "general.", "lm_eval."  # what the names of general abilities begin with


def is_general(name: str) -> bool:
    """Whether a column is one of the base's general abilities."""
    return name.startswith((GENERAL, HARNESS))


@dataclass(frozen=True)
class Plan:
    """What a configuration says of it.

    `evaluate` and `keep` are `evaluate` and `keep_test_rows`; `general` is `general.when`; with `gated` probes are
    scored before the first task and after each, too, and with `gains` each task before it is trained.
    """

    evaluate: str
    keep: bool = True
    general: str = "each"
    gated: bool = False
    gains: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Plan:
        """From a run's configuration as it is written down."""
        general, gate = (config.get(key) or {} for key in ("general", "gate"))
        lose, gain = gate.get("lose"), gate.get("gain")
        return cls(
            config["evaluate"],
            config["keep_test_rows"],
            general.get("when", "each"),
            lose is not None,
            lose is not None and gain is not None,
        )

    def asked(self, stages: Sequence[str], columns: Sequence[str], stage: int) -> list[str]:
        """The tasks that are scored after stage `stage` (from 0; -1: before the first).

        Without `keep` none whose last stage is over is scored, as its test rows are gone.

        Args:
            stages: The task of each stage.
            columns: All tasks that are scored at some time.
            stage: The stage.
        """
        evaluate, seen = scored_as(self.evaluate, self.keep), list(dict.fromkeys(stages[: stage + 1]))
        found = {"all": list(columns), "seen": seen, "final": [], "diagonal+final": seen and [stages[stage]]}[evaluate]
        found = list(columns) if stage == len(stages) - 1 else found
        probes = [name for name in columns if name not in stages]
        often = [name for name in probes if is_general(name)] if self.general == "each" or stage == UNTRAINED else []
        often = probes if self.gated else often
        ahead = [name for name in stages[stage + 1 : stage + 2] if self.gains]
        gone = set() if self.keep else set(stages[: max(stage, 0)]) - set(stages[max(stage, 0) :])
        return [name for name in dict.fromkeys([*found, *often, *ahead]) if name not in gone]

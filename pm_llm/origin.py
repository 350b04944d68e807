"""What a run begins with: the base's own abilities as a past task, and an adapter made elsewhere.

Both become past terms before the first task is trained, so that penalties and merges protect them as they protect a
task that was trained here. Of the rows only the curvature is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import zeros_like
from transformers import AutoTokenizer, set_seed

from pm_llm.adapters.adapter import Adapter, same_base
from pm_llm.adapters.live import TASK, lora_layers, set_active
from pm_llm.adapters.untrusted import TOKENIZER_FILES, fetched
from pm_llm.algebra.lowrank import LowRank
from pm_llm.config import RunConfig
from pm_llm.constraints.base import Context, Live
from pm_llm.errors import PmLlmError
from pm_llm.evaluation.generate import answered
from pm_llm.families.base import Row
from pm_llm.families.models import add_task_adapter, load_tokenizer
from pm_llm.families.packing import blocks
from pm_llm.fisher.base import Fisher
from pm_llm.fisher.rows import ChosenRows, drawn
from pm_llm.merges.base import Fold, Trained
from pm_llm.run.reading import ADAPTER, CURVATURE, MEMORY
from pm_llm.session import Session
from pm_llm.system.processes import Clock, on_main, process_state, total
from pm_llm.system.progress import say
from pm_llm.tasks.base import Example, Task
from pm_llm.tasks.chat_template import MARK, render
from pm_llm.tasks.encoding import Encoder
from pm_llm.tasks.fitting import encoders_for
from pm_llm.tasks.problems import Problems
from pm_llm.tasks.user import rows_or_prompts

GIVEN, ANSWERED, WRITTEN = "rows", "prompts that the model answers", "text that the model writes"
DRAWN = "raw text with the model's own next tokens"


@dataclass(frozen=True)
class Sources:
    """What a run begins with, as it was read: the adapter, rows or prompts of its task, and general ones."""

    adapter: Adapter | None
    rows: list[Task]
    general: list[Task]


def read_sources(config: RunConfig) -> Sources | None:
    """None where a run begins with the bare model. Raises PmLlmError on an adapter or rows that cannot be used."""
    given, problems = config.adapter, Problems(drop=config.bad_rows == "drop")
    folder = Path(config.data_dir) if config.data_dir else None
    if given.path is None and config.general.data is None:
        return None
    adapter = None
    if given.path is not None:
        place = fetched(given.path, given.revision, given.subfolder)
        adapter = Adapter.load(place)
        adapter.check_finite("given")
        _check_base(adapter, Path(place), config)
    rows, general = (
        [] if data is None else rows_or_prompts(data, folder, problems) for data in (given.data, config.general.data)
    )
    problems.tell()
    return Sources(adapter, rows, general)


def _check_base(adapter: Adapter, folder: Path, config: RunConfig) -> None:
    """Raise PmLlmError if the adapter belongs to another base model or vocabulary, as far as it tells."""
    named = f"the adapter {config.adapter.path!r}"
    if adapter.base_model and not same_base(adapter.base_model, config.model):
        raise PmLlmError(
            f"{named} belongs to the base model {adapter.base_model!r}, and the run's is {config.model!r}. Give the "
            "base that it was trained on as `model`."
        )
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        try:
            theirs = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False).get_vocab()
        except Exception:  # whatever transformers makes of files of another version: they are not needed here
            say(f"{named}: the tokenizer beside it cannot be read, so its vocabulary was not compared")
            return
        ours = load_tokenizer(config.model)[0].get_vocab()
        other = sorted(token for token in theirs if theirs[token] != ours.get(token))
        if other:
            raise PmLlmError(
                f"{named} was trained with another vocabulary: {len(other)} of its tokens (such as {other[0]!r}) are "
                f"not those of {config.model!r}. Give the base that it was trained on as `model`."
            )


class Origin:
    """Makes a session begin with these.

    Args:
        session: What the run has at hand; its running adapter, merger and memories are those of the beginning then.
        sources: As they were read.
    """

    def __init__(self, session: Session, sources: Sources) -> None:
        self.session, self.sources = session, sources
        self.seed = session.config.seed_of(0)
        self.clock = Clock(process_state().device)
        self.record: dict[str, Any] = {"modules": None, "folds": 0, "adapter": None, "general": None}
        self.begin: Adapter  # what the first task begins at
        self.zero: Adapter  # the base model in its coordinates: B = 0, and the same A

    def run(self) -> None:
        """Measure and remember what there is, and commit it."""
        session, given = self.session, self.sources.adapter
        set_seed(self.seed)
        self._place(given)
        session.memories = []
        if self.sources.general:
            self._general()
        if given is not None:
            self._adapter()
        known = given is not None or session.merger.rule.quadratic
        self.record["folds"] = session.folds = session.merger.tasks = int(known)
        self.clock.stop("origin")
        self.record["seconds"] = self.clock.seconds["origin"]
        session.begin_at(self.begin)
        on_main(lambda: session.run_dir.commit_origin(self.record, self._fill))

    def _fill(self, folder: Path) -> None:
        session = self.session
        self.begin.save(folder / ADAPTER)
        for name, tensors in ((CURVATURE, session.merger.state_dict()), (MEMORY, session.memory_tensors())):
            if tensors:
                save_file(tensors, folder / name)

    def _place(self, given: Adapter | None) -> None:
        """A task adapter on the modules of the run and of what is given; where nothing is given it begins anew."""
        session = self.session
        model = add_task_adapter(session.model, session.lora, session.base.family, TASK)
        more = set() if given is None else set(given.factors) - set(lora_layers(model))
        if more and given is not None:
            self.record["modules"] = sorted({*lora_layers(model), *given.factors})
            session.modules = self.record["modules"]
            model = add_task_adapter(model.unload(), session.lora, session.base.family, TASK)
        session.model = model
        set_active(model, [TASK], trainable=TASK)
        fresh = Adapter.from_model(model, TASK)
        factors = dict(fresh.factors)
        for name, x in (given.factors if given is not None else {}).items():
            if name not in factors or factors[name].shape != x.shape:
                found = f"is {factors[name].shape} there" if name in factors else "is no linear layer there"
                raise PmLlmError(
                    f"the adapter {session.config.adapter.path!r} does not fit {session.config.model!r}: {name}, "
                    f"{x.shape}, {found}. It is an adapter of another base model."
                )
            factors[name] = x
        self.begin = fresh.replace_factors(factors)
        self.zero = fresh.replace_factors({name: LowRank(zeros_like(x.B), x.A) for name, x in factors.items()})

    def _general(self) -> None:
        """The base model's own Fisher: around the base itself, where its loss has no slope."""
        config = self.session.config.general
        self._attach(self.zero)
        chosen, how = self._chosen("general", self.sources.general, config.samples, config.labels)
        fold = Fold(1, {}, self.zero.factors, trained=Trained("base", began=self.zero.factors))
        rule = self.session.merger.rule
        form = rule.needs.form(self.session.config.fisher.form) if rule.quadratic else None
        if form is not None:
            fisher = chosen.fisher(self.session.model, form, zeros=self.session.zeros)
            rule.inherit(replace(fold, fisher=fisher), scaled=False, weight=config.weight)
        self._remember(chosen, self.zero, keep=False, weight=config.weight)
        self.record["general"] = {"from": how, "rows": chosen.count}
        say(f"the base's own abilities are known by {chosen.count} rows: {how}")

    def _adapter(self) -> None:
        """The given adapter as a past task, trained elsewhere from the base model."""
        session, config = self.session, self.session.config
        self._attach(self.begin)
        found = {"path": config.adapter.path, "revision": config.adapter.revision, "rank": self.begin.rank}
        self.record["adapter"] = {**found, "from": None, "rows": 0}
        if not config.adapter.protect:
            return
        chosen, how = self._chosen("adapter", self.sources.rows, config.fisher.samples, config.adapter.labels)
        rule = session.merger.rule
        before = self.zero.factors if self.sources.general else {}
        fold = Fold(2 if before else 1, before, self.begin.factors, trained=Trained("base", began=self.zero.factors))
        form = rule.needs.form(config.fisher.form) if rule.quadratic else None
        if form is not None:
            loss = None
            if rule.needs.losses:
                self._attach(self.zero)
                loss = chosen.loss(session.model)
                self._attach(self.begin)
            direction = rule.direction(fold) if rule.needs.direction else None
            rule.inherit(replace(fold, fisher=chosen.fisher(session.model, form, direction, loss, session.zeros)))
        self._remember(chosen, self.begin, keep=True)
        self.record["adapter"] |= {"from": how, "rows": chosen.count}
        say(f"the adapter {config.adapter.path} is known by {chosen.count} rows: {how}")

    def _remember(self, chosen: ChosenRows, new: Adapter, keep: bool, weight: float = 1.0) -> None:
        """What constraints remember of it; those that keep rows only with `keep`."""
        session = self.session
        constraints = session.constraints()
        live = Live(lora_layers(session.model), TASK, total, session.base.family)
        context = Context(1, {}, session.merger.rule, live, session.model, chosen, chosen.rows, self.seed, new.factors)
        for one in constraints:
            if one.fills("remember") and (keep or not one.old_data):
                form = one.inherits or one.needs.form(session.config.fisher.form)
                fisher = None if form is None else chosen.fisher(session.model, form, zeros=session.zeros)
                if fisher is not None and weight != 1:
                    fisher = Fisher({name: x.divided(1 / weight) for name, x in fisher.modules.items()})
                one.inherit(replace(context, fisher=fisher))
        session.memories = [one.memory() for one in constraints]

    def _attach(self, adapter: Adapter) -> None:
        adapter.attach(self.session.model, TASK)
        set_active(self.session.model, [TASK], trainable=TASK)

    # ---- the rows ----
    def _chosen(self, name: str, tasks: list[Task], samples: int, labels: str) -> tuple[ChosenRows, str]:
        """The rows that it is measured on, with answers, and where these come from."""
        if {task.kind for task in tasks} - {"prompt"}:
            return self._of_text(name, tasks, samples, labels)
        rows: list[tuple[Encoder, Example]] = []
        for task in tasks:
            encoders, fitting = encoders_for(self.session.config, [task])
            rows += [(encoders[task.name], row) for row in fitting(task).train]
        how = GIVEN if labels == "given" and all(row.completion for _, row in rows) else ANSWERED
        taken = [rows[i] for i in drawn(len(rows), samples, self.seed)]
        if not tasks:
            found, how = self._written(samples), WRITTEN
        else:
            found = self._answered([(one, row, labels == "given" and bool(row.completion)) for one, row in taken])
        fishers = replace(self.session.config.fisher, samples=len(found))
        base = self.session.base
        return ChosenRows(name, found, fishers, self.seed, base.tokenizer, base.family), how

    def _of_text(self, name: str, tasks: list[Task], samples: int, labels: str) -> tuple[ChosenRows, str]:
        """The same of raw text, in blocks."""
        session, rows = self.session, []
        if {task.kind for task in tasks} != {"text"}:
            raise PmLlmError(
                f"{name}.data: give prompts (with or without answers) or raw text, and not both or pairs."
            )
        for task in tasks:
            encoders, fitting = encoders_for(session.config, [task])
            encoder = encoders[task.name]
            rows += encoder.features(fitting(task).train)
        found = blocks(rows, session.config.max_length, session.model)
        taken = [found[i] for i in drawn(len(found), samples, self.seed)]
        if labels == "sampled":
            taken = encoder.family.draw(session.model, encoder, taken, self.seed, session.config.evaluation)
        fishers = replace(session.config.fisher, samples=len(taken))
        how = GIVEN if labels == "given" else DRAWN
        return ChosenRows(name, taken, fishers, self.seed, session.base.tokenizer, encoder.family), how

    def _answered(self, rows: list[tuple[Encoder, Example, bool]]) -> list[Row]:
        """Encoded rows, each with its own answer, or with one drawn from the model."""
        mine = self._drawing()
        found = [encoder.features([row])[0] if own else {} for encoder, row, own in rows]
        asked = [i for i, row in enumerate(found) if not row]
        prompts = [replace(rows[i][0], max_new_tokens=mine.max_new_tokens).prompt(rows[i][1]) for i in asked]
        for i, row in zip(asked, self._drawn(mine, prompts), strict=True):
            found[i] = row
        return found

    def _written(self, count: int) -> list[Row]:
        """Text that the model writes from nothing: with a chat template a question, as in Magpie (arXiv 2406.08464),
        and its answer to it; else whatever comes after the begin of a text."""
        encoder = self._drawing()
        tokenizer = encoder.tokenizer
        if not tokenizer.chat_template:
            first = tokenizer.bos_token_id if encoder.family.task_type == "CAUSAL_LM" else None
            opening = [tokenizer.eos_token_id if first is None else first]
            return self._drawn(encoder, [opening] * count)
        head = render(tokenizer, [{"role": "user", "content": MARK}]).partition(MARK)[0]
        opening = encoder.ids(head, split_special_tokens=False)
        asked = [[i for i in row["labels"] if i != -100] for row in self._drawn(encoder, [opening] * count)]
        texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in asked]
        rows = [Example("", "", messages=({"role": "user", "content": text},)) for text in texts if text]
        if not rows:
            raise PmLlmError("the model writes no text by itself. Give rows or prompts with adapter.data.")
        return self._answered([(encoder, row, False) for row in rows])

    def _drawing(self) -> Encoder:
        """An encoder with room for drawn answers."""
        config, base = self.session.config, self.session.base
        most = min(config.fisher.max_new_tokens, max(1, config.max_length // 2))
        return Encoder(base.tokenizer, base.family, config.max_length, most)

    def _drawn(self, encoder: Encoder, prompts: list[list[int]]) -> list[Row]:
        session = self.session
        return answered(session.model, encoder, prompts, self.seed, session.config.evaluation)

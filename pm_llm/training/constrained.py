"""Constraints around a Trainer's step."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from pm_llm.adapters.live import factors_of, lora_layers, scaled, set_active, stretched, trainable_adapter
from pm_llm.algebra.lowrank import LowRank
from pm_llm.constraints.base import Constraint, Live, Step
from pm_llm.errors import NonFiniteLossError, PmLlmError
from pm_llm.evaluation.generate import evaluating
from pm_llm.families.base import family_of
from pm_llm.system.sharding import is_sharded
from pm_llm.system.sharing_out import hide_from_ddp
from pm_llm.training.checkpoints import Checkpoints
from pm_llm.training.launchers import refuse_sharding

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer  # what it is mixed into
else:
    _Trainer = object


class AlreadyTrainedError(Exception):
    """Training went on from the checkpoint of its last step: there is nothing left to do.

    The Trainer looks at the number of steps after a step only, and would train one too many where the last step is not
    at the end of an epoch.
    """


class _AfterUpdate(TrainerCallback):
    """Lets constraints act when the optimizer has moved the parameters."""

    def __init__(self, trainer: ConstraintMixin) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        for constraint in sorted(self.trainer.constraints, key=lambda c: not c.scales_update):
            constraint.after_update(self.trainer.step, self.trainer.live)


class ConstraintMixin(_Trainer):
    """Puts constraints around the Trainer's step. Not a Trainer by itself.

    The scale of the task adapter holds for the whole `training_step`, that is forward *and* backward: gradient
    checkpointing runs the forward again inside the backward, and would otherwise see another scale.
    """

    def __init__(
        self,
        *args: Any,
        constraint: Constraint | Sequence[Constraint] = (),
        checkpoints: Checkpoints | None = None,
        **kwargs: Any,
    ) -> None:
        self.constraints = [constraint] if isinstance(constraint, Constraint) else list(constraint)
        self.checkpoints = checkpoints
        self._staging: Path | None = None  # where a checkpoint is being written
        given = args[0] if args else kwargs.get("model")
        trained = [(p, p.data) for p in given.parameters() if p.requires_grad] if isinstance(given, PeftModel) else []
        super().__init__(*args, **kwargs)
        for parameter, data in trained:  # of a 4-bit model TRL rounds the adapter to bfloat16, a checkpoint does not
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
        model = self.peft_model
        if not isinstance(model, PeftModel):
            raise PmLlmError(f"the model is a {type(model).__name__}; give a PeftModel with a LoRA adapter.")
        self.adapter_name = trainable_adapter(model)
        self.live = Live(dict(lora_layers(model)), self.adapter_name, self._total, family_of(model))
        if any(self.adapter_name in layer.lora_variant for layer in self.live.layers.values()):
            raise PmLlmError(
                f"adapter {self.adapter_name!r} is a variant of LoRA (such as DoRA), whose update is not its scaling "
                "times B A. Use plain LoRA or rsLoRA."
            )
        self._scaling = {name: self.live.scaling(name) for name in self.live.layers}
        self._added: Tensor | float = 0.0  # to the loss of the last pass, by constraints
        self._alone = False  # whether the loss is that of a pass by itself, of no step
        self._origin: list[Tensor] = []  # of A and B, where they are stretched away from where they began
        if any(c.space == "factors" for c in self.constraints):
            self._origin = [p.detach().clone() for p in factors_of(self.live.layers.values(), self.adapter_name)]
        self.step = Step(seed=0, step=-1)  # of the last pass
        self._unfinite: Tensor | None = None
        self.add_callback(_AfterUpdate(self))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        for constraint in self.constraints:
            if not (constraint.prepared or constraint.by_itself):
                raise PmLlmError(
                    f"constraint {type(constraint).__name__} does not know its task. Call its prepare(Context(task, "
                    "...)) before each task, or train with ContinualSequence, which does that."
                )
        hide_from_ddp(self.peft_model)
        self.step = Step(seed=0, step=-1)  # also of a Trainer that trains again
        if self.args.ddp_find_unused_parameters is None and self._penalties_reach_all():
            self.accelerator.ddp_handler.find_unused_parameters = False
        try:
            return super().train(*args, **kwargs)
        finally:
            for constraint in self.constraints:
                constraint.prepared = False

    def _penalties_reach_all(self) -> bool:
        """Whether every trained parameter has a part in the penalties: DDP, which looks for those that have none in
        the forward pass, would count an adapter twice that the penalties alone reach."""
        penalised = [c for c in self.constraints if c.fills("penalty")]
        if self.accelerator.num_processes == 1 or not penalised:
            return False
        found, trained = self._sum_of_penalties(penalised), [p for p in self.live.parameters() if p.requires_grad]
        return found.requires_grad and None not in torch.autograd.grad(found, trained, allow_unused=True)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        return super().get_batch_samples(self._once(epoch_iterator), num_batches, device)

    def _once(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches, of an epoch's last only the rows that are left: with several processes, accelerate fills it up
        with the epoch's first rows, which would count twice. What it filled up has no answer here."""
        processes, size = self.accelerator.num_processes, self._train_batch_size
        rows_of_all: Any = self.train_dataset
        counted = processes > 1 and hasattr(rows_of_all, "__len__")  # a stream is given out otherwise
        left = len(rows_of_all) % (size * processes) if counted else 0
        rows = not getattr(self.args, "padding_free", False)  # else a batch is one long row
        for batch in batches:
            if left and rows and self.accelerator.gradient_state.end_of_dataloader:
                batch["labels"][max(left - self.accelerator.process_index * size, 0) :] = -100
            yield batch

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if self.checkpoints and 0 < self.state.max_steps <= self.state.global_step:
            raise AlreadyTrainedError
        step = self.step = self._next_step()
        self._check_sharding()
        for constraint in self.constraints:
            constraint.before_pass(step, self.live, lambda: self._gradient(inputs, num_items_in_batch))
        factor = prod(c.scale(step) for c in self.constraints if c.space == "weights")
        stretch = prod(c.scale(step) for c in self.constraints if c.space == "factors")
        layers, name = self.live.layers.values(), self.adapter_name
        with ExitStack() as stack:
            stack.enter_context(scaled(layers, name, factor))
            stack.enter_context(stretched(layers, name, self._origin, stretch))
            for constraint in self.constraints:
                stack.enter_context(constraint.around(step, self.live, inputs))
            loss = super().training_step(model, inputs, num_items_in_batch)
        # the Trainer's loss is this pass's share of the step's mean
        mean = (loss.detach() - self._added) * step.micro_steps
        bad = ~torch.isfinite(mean)
        self._unfinite = bad if self._unfinite is None else self._unfinite | bad
        for constraint in self.constraints:
            constraint.observe(step, mean)
        if self.accelerator.sync_gradients:
            for constraint in self.constraints:
                constraint.before_update(step, self.live)
        return loss

    def _gradient(self, inputs: dict[str, Any], num_items_in_batch: Any) -> list[Tensor]:
        """The gradient of a pass's loss with its penalties, for A and B of every module; the processes' mean."""
        model = self.peft_model
        model.train()
        counts = {
            key: deepcopy(getattr(self, key)) for key in ("_metrics", "_total_train_tokens") if hasattr(self, key)
        }
        self._alone = True
        try:
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, self._prepare_inputs(dict(inputs)), False, num_items_in_batch)
        finally:
            self._alone = False
        for key, value in counts.items():  # TRL's, of the step itself
            setattr(self, key, value)
        if self._counted(num_items_in_batch):  # a share of the step's: on the scale of the whole
            loss = loss * self.current_gradient_accumulation_steps
        found = torch.autograd.grad(loss, self.live.parameters(), materialize_grads=True)  # 0 where it does not reach
        return [self._total(g) / self.accelerator.num_processes for g in found]

    def _total(self, x: Tensor) -> Tensor:
        """The sum over the processes."""
        found: Tensor = self.accelerator.reduce(x, "sum")
        return found

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        with self._listening() as heard:
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        penalised, spoken = ([c for c in self.constraints if c.fills(hook)] for hook in ("penalty", "loss"))
        if not (penalised or spoken) or not model.training:
            return found
        # the Trainer divides what a pass adds by the number of passes unless the loss counts tokens
        passes = self.current_gradient_accumulation_steps
        counted = self._counted(num_items_in_batch)
        added = torch.zeros((), device=self.args.device)
        if self._alone:
            added = self._sum_of_penalties(penalised) / (passes if counted else 1)
        elif self.accelerator.sync_gradients:  # once a step: A and B are the same in all passes, or drawn anew
            added = self._sum_of_penalties(penalised) * (1 if counted else passes)
        if spoken:
            added = added + self._terms(spoken, inputs, heard, num_items_in_batch)
        self._added = added.detach() / (1 if counted else passes)
        if isinstance(found, tuple):
            return (found[0] + added, *found[1:])
        return found + added

    def _listening(self) -> Any:
        if not any(c.fills("loss") for c in self.constraints):
            return nullcontext([])
        return self.live.family.listening(self.peft_model)

    def _terms(
        self, spoken: Sequence[Constraint], inputs: dict[str, Any], heard: list[Any], num_items_in_batch: Any
    ) -> Tensor:
        """What constraints add at the answers' tokens, as part of the step's mean over them."""
        model = self.peft_model
        family, layers = self.live.family, self.live.layers.values()
        outputs, labels = family.said(model, heard, inputs), family.labels(inputs)

        @lru_cache  # one pass for all of them
        def reference(of: str) -> Tensor:
            off = [self.live.adapter] if of == "before" else model.active_adapters
            batch = {key: x for key, x in inputs.items() if isinstance(x, Tensor)}
            with torch.no_grad(), evaluating(model), ExitStack() as stack:
                for name in off:
                    stack.enter_context(scaled(layers, name, 0.0))
                logits, own = family.answers(model, batch)
            return logits[own != -100]

        found = [c.loss(self.step, self.live, inputs, outputs, reference) for c in spoken]
        each = sum((x for x in found if x is not None), start=outputs.new_zeros(len(outputs), dtype=torch.float32))
        if num_items_in_batch is None:
            return each.sum() / (labels != -100).sum().clamp(min=1)
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        result: Tensor = each.sum() / num_items_in_batch * processes
        return result

    def _counted(self, num_items_in_batch: Any) -> bool:
        """Whether the loss counts the tokens of all passes of a step, and is not divided by their number."""
        return bool(self.model_accepts_loss_kwargs) and num_items_in_batch is not None

    def _check_sharding(self) -> None:
        sharded = is_sharded(self.peft_model)
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        refuse_sharding(self.constraints, sharded, deepspeed)

    def _sum_of_penalties(self, penalised: Sequence[Constraint]) -> Tensor:
        """The sum of the constraints' penalties on the trained update.

        A perturbation in the space of the weights only scales the forward pass, so the penalty sees the update without
        it. What changes A and B themselves for the pass (perturb in factors, gaussian) is seen.
        """
        names = list(self.live.layers)
        pairs = [[x.float() for x in self.live.weights(name)] for name in names]
        scaled_b = torch._foreach_mul([b for _, b in pairs], [self._scaling[name] for name in names])
        live = {name: LowRank(b, a) for name, b, (a, _) in zip(names, scaled_b, pairs, strict=True)}
        found = [p for c in penalised for p in [c.penalty(live)] if p is not None]
        return sum((p.to(self.args.device) for p in found), start=torch.zeros((), device=self.args.device))

    @property
    def peft_model(self) -> Any:
        """The PeftModel itself, without what a launcher wraps around it."""
        return self.accelerator.unwrap_model(self.model)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._check_finite()
        for constraint in self.constraints if self.peft_model.training else ():
            if not constraint.fills("logs"):
                continue
            sums = {
                key: torch.stack([x.to(self.args.device) for x in v]) for key, v in constraint.state_dict().items()
            }
            if sums:
                sums = self.accelerator.reduce(sums, "sum")
            logs.update(constraint.logs({key: v.tolist() for key, v in sums.items()}))
        super().log(logs, start_time)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            with self._same_activation():
                super()._load_from_checkpoint(*args, **kwargs)
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            raise PmLlmError(
                f"the checkpoint is of an adapter with other sizes: {error} What is kept of the weights (constrain "
                "osft) is measured and may come out otherwise on other hardware. Redo the task with --restart-from."
            ) from error

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._check_finite()
        step = self.state.global_step
        try:
            with self.checkpoints.writing(step) if self.checkpoints else nullcontext() as self._staging:
                super()._save_checkpoint(model, trial)
                self._drop_adapters()
                sums = self._constraint_sums()
                if sums:
                    folder = Path(self._get_output_dir(trial)) / f"checkpoint-{step}"
                    save_file(sums, folder / self._constraints_file())
        finally:
            self._staging = None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        file = Path(checkpoint or "") / self._constraints_file()
        if checkpoint is None or not file.is_file():
            return
        found = load_file(file)
        self._origin = [found[f"origin.{j}"] for j in range(len(self._origin))]
        for i, constraint in enumerate(self.constraints):
            state: dict[str, dict[int, Tensor]] = defaultdict(dict)
            for key in [key for key in found if key.startswith(f"{i}.")]:
                name, _, place = key.removeprefix(f"{i}.").rpartition(".")
                state[name][int(place)] = found[key]
            constraint.load_state_dict({name: [one[j] for j in range(len(one))] for name, one in state.items()})

    def _drop_adapters(self) -> None:
        """Keep only what training goes on from: of sharded models their own state, else the task adapter alone.

        The frozen adapter is in the run already; and under FSDP each adapter's file gets the weights of all.
        """
        if self.checkpoints is None or not self.accelerator.is_main_process:
            return
        sharded = is_sharded(self.peft_model)
        for file in Path(self._get_output_dir(None)).glob("checkpoint-*/*/adapter_config.json"):
            if sharded or file.parent.name != self.adapter_name:
                shutil.rmtree(file.parent)

    def _constraint_sums(self) -> dict[str, Tensor]:
        """What the constraints have summed up, each tensor under `constraint.name.number`, and the origin."""
        states = [constraint.state_dict() for constraint in self.constraints]
        sums = {
            f"{i}.{k}.{j}": x.contiguous() for i, s in enumerate(states) for k, v in s.items() for j, x in enumerate(v)
        }
        return sums | {f"origin.{j}": x for j, x in enumerate(self._origin)}

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        if self.checkpoints is None:  # a checkpoint within a run is nothing to publish
            super().create_model_card(*args, **kwargs)

    def _constraints_file(self) -> str:
        return f"constraints-{self.accelerator.process_index}.safetensors"

    def _load_best_model(self) -> None:
        with self._same_activation():
            super()._load_best_model()

    @contextmanager
    def _same_activation(self) -> Iterator[None]:
        """Transformers loads a checkpoint's adapters and leaves the first of them active and trainable."""
        model = self.peft_model
        active = list(model.active_adapters)
        try:
            yield
        finally:
            set_active(model, active, trainable=self.adapter_name)

    def _next_step(self) -> Step:
        step = self.state.global_step
        return Step(
            seed=self.args.seed,
            step=step,
            steps=self.state.max_steps,
            micro_step=self.step.micro_step + 1 if self.step.step == step else 0,
            micro_steps=self.current_gradient_accumulation_steps,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )

    def _check_finite(self) -> None:
        """Every process must stop, or the others would wait for it for ever: the flag is reduced over them."""
        if self._unfinite is None:
            return
        bad = self.accelerator.reduce(self._unfinite.float(), "sum")
        self._unfinite = None
        if bad.item() > 0:
            raise NonFiniteLossError(
                f"the training loss became NaN or infinite by step {self.state.global_step}. "
                "Lower the learning rate, or train in float32 or bfloat16 (T5 overflows in float16). "
                "The running adapter is untouched."
            )

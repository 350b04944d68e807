"""`pm-llm doctor`: what of this machine and configuration will not work, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from pm_llm.config import RunConfig
from pm_llm.errors import PmLlmError, first_line
from pm_llm.system.files import size_of
from pm_llm.system.lock import try_lock

OK, WARNING, FAILURE = "ok", "warning", "FAILURE"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's: `what` was looked at, what was found, and what to do where it is not well."""

    level: str
    what: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.level:<8} {self.what}: {self.found}" + (f". {self.remedy}" if self.remedy else "")


def examine(config: RunConfig) -> list[Finding]:
    """Everything that can be known before a run of `config` begins."""
    checks = (_versions, _devices, _precision, _quantisation, _room, _hub)
    return [finding for check in checks for finding in check(config)]


def _versions(config: RunConfig) -> Iterator[Finding]:
    """The lower bounds that the package itself states."""
    yield Finding(OK, "python", platform.python_version())
    wanted = config_extras(config)
    for line in importlib.metadata.requires("pm_llm") or ():
        requirement = Requirement(line)
        extra = next((name for name in ("report", "qlora") if _needs(requirement, name)), None)
        if requirement.marker is not None and extra is None:
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            needed = extra is None or extra in wanted
            install = (
                f'pip install "pm_llm[{extra}]"'
                if extra
                else f'pip install "{requirement.name}{requirement.specifier}"'
            )
            yield Finding(FAILURE if needed else WARNING, requirement.name, "is not installed", install)
            continue
        if requirement.specifier.contains(version, prereleases=True):
            yield Finding(OK, requirement.name, version)
        else:
            remedy = f'pip install "{requirement.name}{requirement.specifier}"'
            yield Finding(FAILURE, requirement.name, f"{version} is not {requirement.specifier}", remedy)


def _needs(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    return marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def config_extras(config: RunConfig) -> set[str]:
    """The optional parts that a configuration cannot do without."""
    return {"qlora"} if config.load_in_4bit else set()


def _devices(config: RunConfig) -> Iterator[Finding]:
    count = torch.cuda.device_count()
    for i in range(count):
        gpu = torch.cuda.get_device_properties(i)
        yield Finding(OK, f"GPU {i}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
    if count > 1:
        yield Finding(
            WARNING, "launch", f"{count} GPUs: pm-llm run is refused", "Use accelerate launch, or CUDA_VISIBLE_DEVICES"
        )
    if not count:
        found = f"none; {os.cpu_count()} CPU cores, {memory() / 2**30:.0f} GiB of memory"
        yield Finding(WARNING, "GPU", found, "Small models train on CPU; for others use a machine with a GPU")
    if shutil.which("mpirun") is None and not count:
        remedy = "Use accelerate_configs/ddp_cpu.yaml, which needs none"
        yield Finding(WARNING, "mpirun", "not found: accelerate's MULTI_CPU would start one process only", remedy)


def memory() -> int:
    """The machine's, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _precision(config: RunConfig) -> Iterator[Finding]:
    where = "this GPU" if torch.cuda.is_available() else "this CPU"
    if bfloat16_works():
        yield Finding(OK, "bfloat16", f"works on {where}")
    else:
        level = FAILURE if config.dtype == "bfloat16" else WARNING
        yield Finding(level, "bfloat16", f"is not supported by {where}", "Use --dtype float32")


def bfloat16_works() -> bool:
    """Whether the device that a run would take computes in it."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    x = torch.ones(8, 8, dtype=torch.bfloat16, requires_grad=True)
    try:
        (x @ x).sum().backward()
    except RuntimeError:
        return False
    return True


def _quantisation(config: RunConfig) -> Iterator[Finding]:
    if not config.load_in_4bit:
        return
    try:
        import bitsandbytes

        layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        result = layer.to(device)(torch.ones(1, 64, device=device))
        yield Finding(OK, "4-bit weights", f"work on {result.device.type}")
    except (ImportError, RuntimeError, AttributeError) as error:
        reason = first_line(error)
        yield Finding(FAILURE, "4-bit weights", f"do not work: {reason}", "pip install -U bitsandbytes")


def _room(config: RunConfig) -> Iterator[Finding]:
    """Disk for what a run writes, and memory for the Fisher's sums while a task's rows are seen."""
    folder = Path(config.output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    yield from _folder(folder)
    free = shutil.disk_usage(folder).free
    if not config.tasks and config.benchmark is None:
        yield Finding(WARNING, "disk", f"{size_of(free)} free in {folder}; there are no tasks to tell what is needed")
        return
    try:
        need, sums, tasks = expected_bytes(config)
    except PmLlmError as error:
        yield Finding(FAILURE, "model and tasks", str(error))
        yield Finding(WARNING, "disk", f"{size_of(free)} free in {folder}; what is needed is not known")
        return
    if config.fisher.storage == "disk" and _form_of(config) == "dense":
        need, sums = need + sums, 0
    found = f"{size_of(free)} free in {folder}, about {size_of(need)} needed for {tasks} tasks"
    if free < need:
        yield Finding(FAILURE, "disk", found, "Make room, choose another --output_dir, or a method without curvature")
    else:
        yield Finding(OK, "disk", found)
    most = memory()
    found = f"{size_of(sums)} of {size_of(most)} for a process's sums of the Fisher"
    if sums > most / 2:
        more = "Use --fisher.storage disk, or" if _form_of(config) == "dense" else "Use"
        yield Finding(WARNING, "memory", found, f"{more} a merge with the factored form")
    elif sums:
        yield Finding(OK, "memory", found)


def _folder(folder: Path) -> Iterator[Finding]:
    """Whether files can be made, locked, flushed and linked where the run is to be."""
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".pm-llm-doctor.") as scratch:
            with (Path(scratch) / "file").open("w") as file:
                try_lock(file)
                os.fsync(file.fileno())
            (Path(scratch) / "link").symlink_to("file")
    except OSError as error:
        remedy = "A run needs a folder with files, locks and symbolic links. Choose another --output_dir"
        yield Finding(FAILURE, "folder", f"{folder}: {error.strerror}", remedy)
    else:
        yield Finding(OK, "folder", f"{folder} takes files, locks and links")


def expected_bytes(config: RunConfig) -> tuple[int, int, int]:
    """What a run will write at most at one time, from the shapes of the adapted layers; what a process's sums of the
    Fisher take while rows are seen; and the number of tasks.

    Written are: adapters of every task (merged and as trained) and the constraints' memory after it (old rows aside),
    what the merge remembers after the last tasks (`keep_curvature`) and one more, a checkpoint with two moments, and
    the one that replaces it. In bytes of float32.

    Raises:
        PmLlmError: If the model or the tasks cannot be had.
    """
    from pm_llm.adapters.live import lora_layers
    from pm_llm.families.models import add_task_adapter, empty_base
    from pm_llm.tasks.loading import load_tasks, scored

    stages = load_tasks(config)
    scored(config, stages)
    tasks = len(stages)
    model, family = empty_base(config.model)
    layers: Any = lora_layers(add_task_adapter(model, config.lora, family, "task")).values()
    shapes = [(layer.out_features, layer.in_features, layer.r["task"]) for layer in layers]
    trained = sum((n + m) * r for n, m, r in shapes)
    method = config.parsed_method()
    merge, on_base = method.merge.build("merge"), method.start.build("start").begins == "base"
    any_rank = merge.dense or (merge.whole and not on_base)  # a whole model's holds what is merged before it
    tops = [min(n, m, config.max_rank or (n if any_rank else tasks * r)) for n, m, r in shapes]
    merged = sum((n + m) * top for (n, m, _), top in zip(shapes, tops, strict=True))
    form = _form_of(config)
    kept = sum(
        merge.remembers(n, m, r, tasks, r if on_base else min(n, m, top + r), form)
        for (n, m, r), top in zip(shapes, tops, strict=True)
    )
    constraints = [choice.build("constrain") for choice in method.constrain]
    memories = sum(one.remembers(n, m, r) for one in constraints for n, m, r in shapes)
    sums = sum(_sums(form or "", n, m, r) for n, m, r in shapes)
    kept *= min(tasks, config.keep_curvature) + 1
    return 4 * (tasks * (merged + trained + memories) + kept + 2 * (3 * trained + merged)), 4 * sums, tasks


def _form_of(config: RunConfig) -> str | None:
    """Of the Fisher that the run's merge needs."""
    return config.parsed_method().merge.build("merge").needs.form(config.fisher.form)


def _sums(form: str, n: int, m: int, r: int) -> int:
    """Numbers that a process sums up of one (n, m) matrix with an adapter of rank r, for a Fisher of this form ("":
    none is wanted); dense ones are met by the sums of past tasks, before and after the merge."""
    from pm_llm.fisher import moments

    sizes = {
        "dense": 5 * n * m,
        "factored": n + m,
        "kronecker": moments.size(n) + moments.size(m),
        "factors": (n + m) * r,
    }
    return sizes.get(form, 0)


def _hub(config: RunConfig) -> Iterator[Finding]:
    """Who one is on the Hub; the token is never shown."""
    from huggingface_hub import HfApi, constants, get_token

    if get_token() is None:
        yield Finding(WARNING, "Hub", "not logged in: pushing and gated models will fail", "hf auth login")
        return
    if constants.HF_HUB_OFFLINE:
        yield Finding(WARNING, "Hub", "a token is set, but HF_HUB_OFFLINE is on", "Unset it to push or download")
        return
    try:
        name = HfApi().whoami()["name"]
    except Exception as error:  # whatever the HTTP client of this huggingface_hub raises
        reason = first_line(error)
        remedy = "Check the connection and the token (hf auth login)"
        yield Finding(WARNING, "Hub", f"{constants.ENDPOINT} does not take the token: {reason}", remedy)
    else:
        yield Finding(OK, "Hub", f"logged in as {name} at {constants.ENDPOINT}")


def main_text(config: RunConfig) -> tuple[str, int]:
    """All findings, and the exit status: 1 if a run would fail."""
    found = examine(config)
    failures = sum(one.level == FAILURE for one in found)
    end = f"{failures} thing{'s' * (failures > 1)} will not work" if failures else "a run can begin"
    return "\n".join([*map(str, found), "", end]), int(failures > 0)

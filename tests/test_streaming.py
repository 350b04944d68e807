"""Folds module by module: from mapped files, on several threads, into mapped files; and truncation by importance."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from pm_llm import Merger
from pm_llm.adapters.adapter import Adapter
from pm_llm.algebra import lowrank
from pm_llm.algebra.lowrank import LowRank
from pm_llm.errors import PmLlmError
from pm_llm.fisher.base import Fisher
from pm_llm.fisher.row_column import Factored
from pm_llm.system.mapped import mapped_files
from pm_llm.system.parallel import each
from tests.conftest import ROOT
from tests.invariants.test_closed_form import random_adapter


def wide_adapter(seed: int, rank: int, modules: int = 6, size: int = 300) -> Adapter:
    torch.manual_seed(seed)
    names = [f"layers.{i}.q_proj" for i in range(modules)]
    return Adapter(
        {n: LowRank(torch.randn(size, rank), torch.randn(rank, size)) for n in names}, {"target_modules": ["q_proj"]}
    )


def fisher_of(adapter: Adapter, seed: int) -> Fisher:
    torch.manual_seed(seed)
    found = {}
    for name, x in adapter.factors.items():
        r, c = torch.rand(x.shape[0]) ** 4, torch.rand(x.shape[1]) ** 4
        found[name] = Factored(r, c * (r.sum() / c.sum()))
    return Fisher(found)


@pytest.mark.parametrize("granularity", ["model", "module"])
def test_threads_and_mapped_files_change_no_bit(granularity: str, tmp_path) -> None:
    found = {}
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            merger, running = Merger("optimal", max_rank=5, granularity=granularity), None
            for t in range(3):
                new = wide_adapter(t, 4)
                merger.zeros = mapped_files(tmp_path / "sums") if threads == 3 else None
                running = merger.fold(running, new, fisher_of(new, t))
            assert torch.get_num_threads() == threads
            found[threads] = running, merger.report, merger.state_dict()
        finally:
            torch.set_num_threads(1)
    (a, first, one), (b, second, two) = found.values()
    assert first == second
    assert all(torch.equal(x.B, b.factors[n].B) and torch.equal(x.A, b.factors[n].A) for n, x in a.factors.items())
    assert all(torch.equal(x, two[n]) for n, x in one.items())


def test_each_keeps_the_order_and_hands_errors_on() -> None:
    torch.set_num_threads(3)
    try:
        together = threading.Barrier(3, timeout=20)  # passes only if three run at once

        def slow(name: str) -> str:
            together.wait()
            time.sleep(0.01 * int(name))
            return name * 2

        assert each(slow, ["3", "1", "2"]) == {"3": "33", "1": "11", "2": "22"}
        assert list(each(str, ["3", "1", "2"])) == ["3", "1", "2"]
        with pytest.raises(ZeroDivisionError):
            each(lambda name: 1 / int(name), ["1", "0"])
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


def test_an_adapter_from_disk_takes_no_memory_until_it_is_used(tmp_path) -> None:
    """In a process of its own: anonymous memory after loading and folding 32 modules, against their size."""
    script = """
import re, sys, threading, time, torch
from pathlib import Path
from pm_llm.adapters.adapter import Adapter
from pm_llm.algebra.lowrank import LowRank
from pm_llm.merges.files import merge_folders
folder, size = Path(sys.argv[1]), 2048
torch.set_num_threads(2)
for name, rank in (("running", 32), ("new", 16)):
    torch.manual_seed(rank)
    factors = {f"m{i}": LowRank(torch.randn(size, rank), torch.randn(rank, size)) for i in range(32)}
    Adapter(factors, {"target_modules": ["q_proj"]}).save(folder / name)
    del factors
merge_folders(folder / "running", [folder / "new"], [0.5], 32, folder / "warm")
def anonymous():
    return int(re.findall(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024
done, peak, before = threading.Event(), [0], anonymous()
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
merge_folders(folder / "running", [folder / "new"], [0.5], 32, folder / "out")
done.set(); thread.join()
print("added", peak[0] - before)
"""
    # glibc gives large freed blocks back at once with this setting, so that a peak is what is in use
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={"MALLOC_MMAP_THRESHOLD_": "65536", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )
    added = int(re.findall(r"added (-?\d+)", done.stdout)[0])
    one = (tmp_path / "running" / "adapter_model.safetensors").stat().st_size
    assert one > 16e6
    assert added < one  # all in memory would be three adapters and more
    merged = Adapter.load(tmp_path / "out")
    assert merged.rank == 32
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_scaling_of_a_file_is_in_what_is_read(tmp_path) -> None:
    from peft import LoraConfig

    adapter = random_adapter(0)
    state = adapter.peft_state()
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["x"])
    found = Adapter.from_state(state, config)
    for n, x in adapter.factors.items():
        torch.testing.assert_close(found.factors[n].B, 4 * x.B)
        assert torch.equal(found.factors[n].A, x.A)
    assert len(found.factors) == 2
    broken = {k: x[:1] if k.endswith("one.lora_A.weight") else x for k, x in state.items()}
    with pytest.raises(PmLlmError, match="module one has factors B"):
        Adapter.from_state(broken, config)


# ---- truncation ----
def test_weighted_truncation_is_the_best_in_the_weighted_norm() -> None:
    torch.manual_seed(0)
    x = LowRank(torch.randn(30, 8, dtype=torch.float64), torch.randn(8, 20, dtype=torch.float64))
    rows, columns = torch.rand(30, dtype=torch.float64) ** 2 + 0.01, torch.rand(20, dtype=torch.float64) ** 2 + 0.01
    kept, lost, total = lowrank.truncate(x, 3, rows, columns)
    weighted = rows[:, None] * x.dense() * columns
    s = torch.linalg.svdvals(weighted)
    assert kept.rank == 3
    assert lost == pytest.approx(float((s[3:] ** 2).sum()))
    assert total == pytest.approx(float((s**2).sum()))
    assert float(((rows[:, None] * (x.dense() - kept.dense()) * columns) ** 2).sum()) == pytest.approx(lost)
    plain, _, _ = lowrank.truncate(x, 3)
    assert float(((rows[:, None] * (x.dense() - plain.dense()) * columns) ** 2).sum()) > 1.1 * lost
    _, none, whole = lowrank.truncate(x, 8, rows, columns)
    assert none == 0.0
    assert whole == pytest.approx(total)


@pytest.mark.parametrize("form", ["factored", "dense"])
def test_fisher_truncation_loses_less_of_what_matters(form: str) -> None:
    """The past quadratics rise less than with plain truncation, by which the Frobenius error is less."""
    cost, error = {}, {}
    for truncation in ("plain", "fisher"):
        merger, running = Merger("optimal", max_rank=4, truncation=truncation), None
        for t in range(2):
            new = wide_adapter(t, 4, modules=2, size=40)
            fisher = fisher_of(new, t)
            if form == "dense":
                fisher = Fisher.of({n: f.r[:, None] * f.c / f.r.sum() for n, f in fisher.modules.items()})
            exact = Merger("optimal")
            exact.load_state_dict(merger.state_dict(), merger.tasks)
            whole = exact.fold(running, new, fisher)
            running = merger.fold(running, new, fisher)
        lost = {n: lowrank.add(x, running.factors[n].scale(-1.0)) for n, x in whole.factors.items()}
        cost[truncation] = sum(merger.rule.past[n].along(x) for n, x in lost.items())
        error[truncation] = merger.report.truncation_error
        share = sum(lowrank.inner(x, x) for x in lost.values())
        share /= sum(lowrank.inner(x, x) for x in whole.factors.values())
        assert error[truncation] ** 2 == pytest.approx(share, rel=1e-4)
    assert cost["fisher"] < 0.9 * cost["plain"]
    assert error["fisher"] > error["plain"]


def test_a_module_that_no_task_sees_is_truncated_plainly() -> None:
    found = []
    for truncation in ("plain", "fisher"):
        merger, running = Merger("optimal", max_rank=4, truncation=truncation), None
        for t in range(2):
            new = wide_adapter(t, 4, modules=2, size=40)
            fisher = fisher_of(new, t)
            fisher.modules["layers.1.q_proj"] = fisher.modules["layers.1.q_proj"].divided(float("inf"))
            running = merger.fold(running, new, fisher)
        found.append(running.factors["layers.1.q_proj"])
        assert torch.isfinite(found[-1].B).all()
    assert torch.equal(found[0].B, found[1].B)


def test_what_a_fold_returns_is_its_own(tmp_path) -> None:
    """Adapters on disk are mapped: the result must not change with the file it came from."""
    random_adapter(0).save(tmp_path / "a")
    running = Merger("sum").fold(None, tmp_path / "a")
    before = {n: (x.B.clone(), x.A.clone()) for n, x in running.factors.items()}
    file = tmp_path / "a/adapter_model.safetensors"
    with file.open("r+b") as opened:  # in place, as no library should
        opened.seek(-80, 2)
        opened.write(bytes(80))
    assert all(torch.equal(x.B, before[n][0]) and torch.equal(x.A, before[n][1]) for n, x in running.factors.items())


def test_truncation_by_name_only_where_it_can_be() -> None:
    with pytest.raises(PmLlmError, match="plain or fisher"):
        Merger("optimal", truncation="best")
    with pytest.raises(PmLlmError, match="Average"):
        Merger("average", truncation="fisher")


def test_the_scratch_of_a_merge_that_fails_is_gone(tmp_path) -> None:
    from pm_llm.merges.files import merge_folders

    random_adapter(0).save(tmp_path / "a")
    random_adapter(1, modules=("one", "three")).save(tmp_path / "b")
    with pytest.raises(PmLlmError, match="different target modules"):
        merge_folders(tmp_path / "a", [tmp_path / "b"], [0.5], None, Path(tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]

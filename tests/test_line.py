"""The coefficient with the task's loss itself along the line, and only the past as a quadratic."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pm_llm import Merger
from pm_llm.adapters.adapter import Adapter
from pm_llm.errors import PmLlmError
from pm_llm.fisher.base import Fisher
from pm_llm.fisher.dense import Dense
from pm_llm.fisher.of_factors import Factors
from pm_llm.fisher.probe import Probe
from pm_llm.merges.base import Trained
from pm_llm.merges.optimal import POINTS, Optimal, lowest
from tests.conftest import FAMILIES, batch_of, features, make_peft
from tests.invariants.test_closed_form import random_adapter


def pair(space: str) -> tuple[list[Adapter], list[Fisher], Adapter]:
    """Two adapters with Fishers, and the first one as it began."""
    adapters = [random_adapter(seed) for seed in (1, 2)]
    torch.manual_seed(0)
    if space == "factors":
        fishers = [
            Fisher({n: Factors(torch.rand_like(x.B), torch.rand_like(x.A)) for n, x in one.factors.items()})
            for one in adapters
        ]
    else:
        fishers = [Fisher({n: Dense(torch.rand(x.shape)) for n, x in one.factors.items()}) for one in adapters]
    start = adapters[0].replace_factors({n: type(x)(0 * x.B, x.A) for n, x in adapters[0].factors.items()})
    return adapters, fishers, start


def coefficient(space: str, scale: str, current: str, loss=None) -> float:
    adapters, fishers, start = pair(space)
    continues = space == "factors"
    merger = Merger("optimal", space=space, fisher_scale=scale, current=current)
    stands = "base" if continues else "running"
    running = merger.fold(None, adapters[0], fishers[0], Trained(stands, began=start.factors if start else {}))
    assert merger.report.coefficient == 1
    merger.fold(running, adapters[1], fishers[1], Trained(stands, probe=SimpleNamespace(loss=loss)))
    assert merger.report.raw_coefficient == merger.report.coefficient
    return merger.report.coefficient


@pytest.mark.parametrize("scale", ["raw", "own"])
@pytest.mark.parametrize("space", ["weights", "factors"])
def test_a_loss_that_is_its_own_quadratic_gives_the_closed_form(space: str, scale: str) -> None:
    """And one that is flat leaves it to the past; one that is steep, to the task."""
    (past, new), (_, fisher), _ = pair(space)

    def quadratic(at) -> float:
        found = 0.0
        for name, x in at.items():
            one, two, f = new.factors[name], past.factors[name], fisher.modules[name]
            if space == "factors":
                found += float((f.B * (x.B - one.B) ** 2).sum() + (f.A * (x.A - one.A) ** 2).sum()) / 2
            else:
                found += float((f.F * (x.dense() - two.dense() - one.dense()) ** 2).sum()) / 2
        return found

    expected = coefficient(space, scale, "diagonal", None)
    assert 0.1 < expected < 0.9
    assert coefficient(space, scale, "line", quadratic) == pytest.approx(expected, abs=1e-4)
    assert coefficient(space, scale, "line", lambda at: 0.0) == pytest.approx(0.0, abs=1e-4)
    assert coefficient(space, scale, "line", lambda at: 1e6 * quadratic(at)) == pytest.approx(1.0, abs=1e-4)


def test_the_lowest_point_of_a_parabola_and_of_what_falls() -> None:
    assert lowest(POINTS, [(x - 0.3) ** 2 for x in POINTS]) == pytest.approx(0.3)
    for least in (0.02, 0.06, 1 / 17, 0.3, 0.95, 0.99):
        assert lowest(POINTS, [(x - least) ** 2 for x in POINTS]) == pytest.approx(least)
    for beyond, end in ((-0.3, 0.0), (1.4, 1.0)):
        assert lowest(POINTS, [(x - beyond) ** 2 for x in POINTS]) == end
    assert lowest(POINTS, [-x for x in POINTS]) == 1.0
    assert lowest(POINTS, list(POINTS)) == 0.0


def test_what_cannot_be_is_refused() -> None:
    for options in ({"granularity": "layer"}, {"clip": False}):
        with pytest.raises(PmLlmError, match="one alpha for the model"):
            Optimal(current="line", **options)
    adapters, fishers, _ = pair("weights")
    merger = Merger("optimal", current="line")
    running = merger.fold(None, adapters[0], fishers[0])
    with pytest.raises(PmLlmError, match="probe"):
        merger.fold(running, adapters[1], fishers[1])
    before = {key: x.clone() for key, x in merger.state_dict().items()}
    nowhere = SimpleNamespace(loss=lambda at: float("nan"))
    with pytest.raises(PmLlmError, match="loss between"):
        merger.fold(running, adapters[1], fishers[1], Trained(probe=nowhere))
    assert all(torch.equal(x, merger.state_dict()[key]) for key, x in before.items())  # as if nothing had been asked


@pytest.mark.parametrize("family", FAMILIES)
def test_a_probe_tells_the_loss_of_an_adapter(family: str) -> None:
    model = make_peft(family, "task", random_b=True).eval()
    new = Adapter.from_model(model, "task")
    batch = batch_of(family, features(family, 3))

    def loss(asked) -> float:
        with torch.no_grad():
            return float(asked(**batch).loss)

    expected = loss(model)
    half = {name: x.scale(0.5) for name, x in new.factors.items()}
    probe = Probe(model, "task", new, SimpleNamespace(loss=loss))
    other = probe.loss(half)
    assert other != pytest.approx(expected, abs=1e-5)
    assert probe.loss(new.factors) == pytest.approx(expected, abs=1e-5)
    with model.disable_adapter():
        nothing = loss(model)
    assert probe.loss({name: x.scale(0.0) for name, x in new.factors.items()}) == pytest.approx(nothing, abs=1e-5)

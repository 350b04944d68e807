"""What a run begins with: an adapter made elsewhere, and the base's own abilities."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, set_seed

from pm_llm.adapters.adapter import Adapter
from pm_llm.adapters.live import lora_layers
from pm_llm.adapters.untrusted import fetched
from pm_llm.algebra import lowrank
from pm_llm.cli import main
from pm_llm.config import load_config
from pm_llm.errors import PmLlmError
from pm_llm.evaluation.generate import sample
from pm_llm.fisher.measure import sum_fisher
from pm_llm.run.folder import RunDir
from pm_llm.sequence import ContinualSequence
from pm_llm.tasks.encoding import Encoder
from tests.conftest import FAMILIES, KINDS, batch_of, features, make_model, make_peft, tokenizer
from tests.helpers.forks import Forker
from tests.helpers.hub import environment
from tests.helpers.hub_server import HubServer
from tests.helpers.tasks import jsonl_tasks

PRESETS = ("pm", "pm_curvature", "ewc", "coso", "inflora", "seqlora", "average", "replay")


def foreign(family: str, folder: Path, **options) -> Path:
    """An adapter as PEFT alone writes it, of the pico model."""
    model = make_peft(family, random_b=True, **options)
    for name, p in model.named_parameters():
        if ".lora_" in name:
            p.data.mul_(0.3)
    model.save_pretrained(folder)
    return folder


def keys_for(model: str, out: Path, **more: object) -> dict[str, object]:
    keys: dict[str, object] = {"model": model, "output_dir": str(out), "max_length": 64, "fisher.samples": 4}
    keys |= {"benchmark": "embedded", "order": "topic", "max_train_samples": 16, "max_test_samples": 4}
    keys |= {"train.max_steps": 2, "train.learning_rate": 0.02, "lora.r": 4, "fisher.max_new_tokens": 6}
    return {**keys, "method": "pm_curvature", **more}


def run(keys: dict[str, object]) -> dict[str, object]:
    return ContinualSequence(load_config(None, keys)).run()


def origin(out: Path) -> dict[str, object]:
    return RunDir.open(out).state()["origin"]


def same(one: Adapter, other: Adapter) -> None:
    assert set(one.factors) == set(other.factors)
    for name, x in one.factors.items():
        torch.testing.assert_close(x.dense(), other.factors[name].dense(), rtol=1e-4, atol=1e-5)


def prompts_of(tasks: Path, name: str) -> Path:
    rows = [json.loads(line) for line in (tasks / name / "train.jsonl").read_text().splitlines()]
    place = tasks / f"{name}.prompts.jsonl"
    place.write_text("\n".join(json.dumps({"prompt": row["prompt"]}) for row in rows))
    return place


# ---- an adapter made elsewhere ----
@pytest.mark.parametrize("method", PRESETS)
def test_it_is_what_the_first_task_begins_at(method: str, pico_folders, tmp_path) -> None:
    """A task that does not move leaves the adapter exactly as it came, whatever the method."""
    came = foreign("llama", tmp_path / "came")
    tasks = jsonl_tasks(tmp_path / "tasks", "sentiment")
    more = {"adapter.path": str(came), "adapter.data": str(tasks / "sentiment" / "train.jsonl"), "method": method}
    run(keys_for(pico_folders["llama"], tmp_path / "run", **more, **{"train.learning_rate": 1e-7}))
    same(Adapter.load(RunDir.open(tmp_path / "run").origin), Adapter.load(came))
    same(Adapter.load(tmp_path / "run" / "adapter"), Adapter.load(came))


@pytest.mark.parametrize("family", FAMILIES)
def test_where_its_curvature_comes_from(family: str, pico_folders, tmp_path, capsys) -> None:
    came, tasks = foreign(family, tmp_path / "came"), jsonl_tasks(tmp_path / "tasks", "sentiment")
    rows = tasks / "sentiment" / "train.jsonl"
    sources = {
        "rows": {"adapter.data": str(rows)},
        "prompts that the model answers": {"adapter.data": str(prompts_of(tasks, "sentiment"))},
        "text that the model writes": {},
        None: {"adapter.protect": False},
    }
    kept = {}
    for how, more in sources.items():
        out = tmp_path / str(how)
        run(keys_for(pico_folders[family], out, **{"adapter.path": str(came), **more}))
        found = origin(out)["adapter"]
        assert (found["from"], found["rows"] > 0) == (how, how is not None)
        kept[how] = RunDir.open(out).curvature(-1)
    assert kept[None] is None
    assert all(kept[how] for how in sources if how)
    assert not torch.equal(*(next(iter(kept[how].values())) for how in ("rows", "text that the model writes")))
    assert "is known by 4 rows: text that the model writes" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["pm_curvature", "ewc", "coso"])
def test_it_is_measured_once(method: str, pico_folders, tmp_path) -> None:
    """Its rows and its folder may vanish; a run that goes on, or begins again at task 1, has what it needs."""
    came, tasks = foreign("llama", tmp_path / "came"), jsonl_tasks(tmp_path / "tasks", "sentiment")
    data = {"adapter.path": str(came), "adapter.data": str(tasks / "sentiment" / "train.jsonl"), "method": method}
    both = {**data, "order": "topic,question"}
    run(keys_for(pico_folders["llama"], tmp_path / "whole", **both))
    run(keys_for(pico_folders["llama"], tmp_path / "run", **data))
    shutil.rmtree(tasks)
    shutil.rmtree(came)
    keys = keys_for(pico_folders["llama"], tmp_path / "run", **both)
    run(keys)
    expected = (tmp_path / "whole" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == expected
    ContinualSequence(load_config(None, keys), restart_from="topic").run()
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == expected
    # the first task may be trained otherwise; another curvature would need the rows, and nothing is lost by asking
    otherwise = load_config(None, {**keys, "train.learning_rate": 0.01})
    ContinualSequence(otherwise, restart_from="topic").run()
    state = (tmp_path / "run" / "state.json").read_bytes()
    another = load_config(None, {**keys, "fisher.samples": 3})
    with pytest.raises(PmLlmError, match="came"):
        ContinualSequence(another, restart_from="topic")
    assert (tmp_path / "run" / "state.json").read_bytes() == state


def test_ranks_and_targets_of_its_own(pico_folders, tmp_path) -> None:
    """The run adapts the union of both; what only one has is exact in it."""
    options = {"target_modules": ["k_proj", "v_proj"], "r": 6, "rank_pattern": {"v_proj": 2}}
    came = foreign("llama", tmp_path / "came", **options)
    more = {"adapter.path": str(came), "lora.target_modules": ["q_proj", "v_proj"], "lora.layers_to_transform": [1]}
    run(keys_for(pico_folders["llama"], tmp_path / "run", **more, **{"train.learning_rate": 1e-7}))
    held = Adapter.load(tmp_path / "run" / "adapter").factors
    theirs = Adapter.load(came).factors
    assert set(held) == set(theirs) | {"model.layers.1.self_attn.q_proj"}
    for name, x in held.items():
        expected = theirs[name].dense() if name in theirs else torch.zeros(x.shape)
        torch.testing.assert_close(x.dense(), expected, rtol=1e-4, atol=1e-5)
    more |= {"train.learning_rate": 1e-7, "order": "topic,question"}
    run(keys_for(pico_folders["llama"], tmp_path / "run", **more))  # and it goes on
    ids = torch.arange(3, 20)[None]
    one = PeftModel.from_pretrained(make_model("llama"), tmp_path / "run" / "adapter").eval()
    assert torch.isfinite(one(input_ids=ids).logits).all()


def test_later_tasks_leave_it(pico_folders, tmp_path) -> None:
    """With its curvature the penalty holds the adapter's own rows better than without."""
    tasks = jsonl_tasks(tmp_path / "tasks", "sentiment", train=32)
    rows = tasks / "sentiment" / "train.jsonl"
    first = keys_for(pico_folders["llama"], tmp_path / "first", order="sentiment", method="seqlora")
    run({**first, "train.max_steps": 25, "max_train_samples": 32})
    moved = {}
    for protect in (True, False):
        more = {"adapter.path": str(tmp_path / "first" / "adapter"), "adapter.data": str(rows)}
        more |= {"adapter.protect": protect} if not protect else {}
        out = tmp_path / str(protect)
        run(keys_for(pico_folders["llama"], out, **more, **{"train.max_steps": 12, "fisher.samples": 16}))
        moved[protect] = _loss(pico_folders["llama"], out / "adapter") - _loss(
            pico_folders["llama"], tmp_path / "first" / "adapter"
        )
    assert moved[True] < moved[False]


def _loss(base: str, adapter: Path) -> float:
    model = PeftModel.from_pretrained(make_model("llama"), adapter).eval()
    batch = batch_of("llama", features("llama", 32))
    with torch.no_grad():
        return float(model(**batch).loss)


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("ties", "adapter does not go with merge ties"),
        ("opcm", "adapter does not go with merge opcm"),
        ("joint", "start 'alone' leaves that out"),
    ],
)
def test_methods_that_cannot_begin_with_it(method: str, error: str, tmp_path) -> None:
    with pytest.raises(PmLlmError, match=error):
        load_config(None, {"adapter": str(tmp_path), "method": method}).check()


def test_what_is_refused_in_one_line(pico_folders, tmp_path, capsys) -> None:
    model = pico_folders["llama"]

    def error(adapter: object, **more: object) -> str:
        keys = keys_for(model, tmp_path / "run", **{"adapter": adapter, **more})
        with pytest.raises(PmLlmError) as raised:
            ContinualSequence(load_config(None, keys)).run()
        assert "\n" not in str(raised.value)
        assert not (tmp_path / "run" / "stages").exists() or not list((tmp_path / "run" / "stages").iterdir())
        return str(raised.value)

    foreign("llama", tmp_path / "dora", use_dora=True)
    assert "use_dora" in error(str(tmp_path / "dora"))
    came = foreign("llama", tmp_path / "came")
    config = json.loads((came / "adapter_config.json").read_text())

    def named(name: str) -> str:
        place = Path(shutil.copytree(came, tmp_path / "named", dirs_exist_ok=True))
        (place / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
        return str(place)

    other = tmp_path / "other"
    set_seed(9)
    small = make_model("llama")
    small.config.hidden_size = 32
    small.save_pretrained(other)
    with (other / "model.safetensors").open("ab") as file:
        file.write(b"0")
    assert "belongs to the base model" in error(named(str(other)))
    wide = get_peft_model(_wide(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    wide.save_pretrained(tmp_path / "wide")
    assert "It is an adapter of another base model." in error(str(tmp_path / "wide"))
    words = AutoTokenizer.from_pretrained(model)
    words.add_tokens(["<new>"])
    words.save_pretrained(tmp_path / "named")
    assert "was trained with another vocabulary: 1 of its tokens (such as '<new>')" in error(named(""))
    assert "is a folder here, and 'v1' is a revision on the Hub" in error({"path": str(came), "revision": "v1"})
    assert "is not in the adapter's folder" in error({"path": str(came), "subfolder": "../came"})
    assert "adapter.revision is given, and adapter.path is not" in error({"revision": "v1"})
    assert "does not exist" in error({"path": str(came), "data": str(tmp_path / "nothing.jsonl")})


def _wide():
    from transformers import LlamaForCausalLM

    config = make_model("llama").config
    config.hidden_size, config.intermediate_size = 64, 96
    return LlamaForCausalLM(config)


@pytest.mark.slow
def test_from_the_hub(pico_folders, tmp_path) -> None:
    """At a revision, in a subfolder; and what the Hub does not give, in one line."""
    came = foreign("llama", tmp_path / "came")
    with HubServer() as hub:
        hub.repos["user/it"], hub.files["user/it"] = {}, {}
        for file in came.iterdir():
            if file.suffix in (".json", ".safetensors"):
                hub.files["user/it"][f"inner/{file.name}"] = file.read_bytes()
        hub.gated.add("user/gated")
        env = environment(hub, tmp_path)

        def begin(adapter: str, **more: str) -> tuple[int, str]:
            keys = keys_for(pico_folders["llama"], tmp_path / "run", **{"adapter.path": adapter, **more})
            words = [str(word) for key, value in keys.items() for word in (f"--{key}", value)]
            done = forker("run", *words)
            return done.status, done.said

        with Forker(tmp_path, env) as forker:
            for adapter, more, error in (
                ("user/gated", {}, "the Hub asks for a login that has access"),
                ("user/none", {}, "the Hub has none of that name, or shows it only to a login"),
                ("user/it", {"adapter.revision": "v9"}, "it has no revision 'v9' on the Hub"),
                ("user/it", {}, "is not an adapter folder"),
            ):
                status, said = begin(adapter, **more)
                assert (status, error in said) == (2, True), said
            status, said = begin("user/it", **{"adapter.revision": "main", "adapter.subfolder": "inner"})
            assert status == 0, said
    same(Adapter.load(RunDir.open(tmp_path / "run").origin), Adapter.load(came))


# ---- the base's own abilities ----
@pytest.mark.parametrize("method", ["pm", "pm_curvature", "ewc", "coso", "inflora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_general_is_one_more_past_term(family: str, method: str, pico_folders, tmp_path) -> None:
    if family == "t5" and method in ("pm", "inflora"):
        pytest.skip("the same code as for LLaMA, where the model is not touched")
    tasks = jsonl_tasks(tmp_path / "tasks", "sentiment")
    more = {"general": str(prompts_of(tasks, "sentiment")), "general.samples": 6, "method": method}
    run(keys_for(pico_folders[family], tmp_path / "run", **more))
    found = origin(tmp_path / "run")
    assert found["general"] == {"from": "prompts that the model answers", "rows": 6}
    assert found["adapter"] is None
    base = Adapter.load(RunDir.open(tmp_path / "run").origin)
    assert all(not x.dense().any() for x in base.factors.values())
    kept = RunDir.open(tmp_path / "run")
    remembered = kept.curvature(-1) if method.startswith("pm") else kept.memories(-1, 1)[0]
    assert remembered


def test_with_an_adapter_both_are_protected(pico_folders, tmp_path) -> None:
    """Two terms, and their slope at the adapter: `S_general o (M - 0)`, as the adapter's own is 0 there."""
    came, tasks = foreign("llama", tmp_path / "came"), jsonl_tasks(tmp_path / "tasks", "sentiment", "topic")
    rows = str(tasks / "sentiment" / "train.jsonl")
    more = {"adapter": {"path": str(came), "data": rows}, "general": {"data": str(tasks / "topic" / "train.jsonl")}}
    merge = {"name": "optimal", "form": "dense"}
    keys = keys_for(pico_folders["llama"], tmp_path / "run", **more, merge=merge)
    run(keys)
    both = RunDir.open(tmp_path / "run").curvature(-1)
    alone = keys_for(pico_folders["llama"], tmp_path / "one", adapter=more["adapter"], merge=merge)
    run(alone)
    own = RunDir.open(tmp_path / "one").curvature(-1)
    for name, x in Adapter.load(came).factors.items():
        assert (both[f"S.{name}"] >= own[f"S.{name}"]).all()
        assert (both[f"S.{name}"] > own[f"S.{name}"]).any()
        slope = both[f"S.{name}"] * x.dense() - both[f"m.{name}"]
        expected = (both[f"S.{name}"] - own[f"S.{name}"]) * x.dense()
        torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-7)


def test_the_first_task_is_held_back_by_it(pico_folders, tmp_path) -> None:
    """The larger its weight, the less the first task moves."""
    tasks = jsonl_tasks(tmp_path / "tasks", "sentiment")
    sizes = []
    for weight in (1e-6, 1.0, 1e6):
        more = {"general": {"data": str(tasks / "sentiment" / "train.jsonl"), "weight": weight}}
        run(keys_for(pico_folders["llama"], tmp_path / str(weight), **more, **{"train.max_steps": 6}))
        held = Adapter.load(tmp_path / str(weight) / "adapter").factors.values()
        sizes.append(sum(lowrank.inner(x, x) for x in held))
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"method": "seqlora"}, "general is a past task's curvature, and this method has no use for one"),
        ({"merge": {"name": "optimal", "fisher_scale": "own"}}, "general has no task vector"),
        ({"method": "per_task"}, "start 'alone' leaves that out"),
    ],
)
def test_methods_that_have_no_use_for_it(more, error, tmp_path) -> None:
    with pytest.raises(PmLlmError, match=error):
        load_config(None, {"general": "rows.jsonl", **more}).check()


# ---- answers of the model itself ----
def test_sampled_answers_are_the_models_own() -> None:
    """Their frequencies are the model's probabilities; they depend on the seed alone."""
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # a distribution that is not flat
    encoder = Encoder(tokenizer("llama"), KINDS["llama"], 64, 1)
    prompts = [[5, 6, 7]] * 4000
    first = [ids[0] for ids in sample(model, encoder, prompts, 1, 500)]
    assert first == [ids[0] for ids in sample(model, encoder, prompts, 1, 500)]
    assert first != [ids[0] for ids in sample(model, encoder, prompts, 2, 500)]
    with torch.no_grad():
        p = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].softmax(-1)
    counted = torch.bincount(torch.tensor(first), minlength=len(p)) / len(first)
    top = p.topk(5).indices
    assert ((counted[top] - p[top]).abs() < 4 * (p[top] / len(first)).sqrt() + 1e-3).all()


def test_the_fisher_of_sampled_answers_is_the_hessian_of_the_kl() -> None:
    """`1/2 Delta' F Delta` is the KL from the model to the moved one, to second order; given answers have no such."""
    set_seed(0)
    model = make_peft("llama", random_b=True)
    encoder = Encoder(tokenizer("llama"), KINDS["llama"], 64, 1)
    prompts = [row["input_ids"][:12] for row in features("llama", 4)]
    rows = []
    for seed in range(150):
        drawn = sample(model, encoder, prompts, seed, 8)
        rows += [KINDS["llama"].row(p, a) for p, a in zip(prompts, drawn, strict=True)]
    step = {name: torch.randn(layer.out_features, 2) for name, layer in lora_layers(model).items()}
    delta = {n: lowrank.LowRank(1e-2 * b, torch.randn(2, lora_layers(model)[n].in_features)) for n, b in step.items()}
    batches = (batch_of("llama", rows[i : i + 50]) for i in range(0, len(rows), 50))
    exact = sum_fisher(model, batches, "factored", delta).mean().exact
    with torch.no_grad():
        before = [model(input_ids=torch.tensor([p])).logits[0, -1].log_softmax(-1) for p in prompts]
        for name, layer in lora_layers(model).items():
            layer.get_base_layer().weight += delta[name].dense()
        after = [model(input_ids=torch.tensor([p])).logits[0, -1].log_softmax(-1) for p in prompts]
    kl = sum(float((a.exp() * (a - b)).sum()) for a, b in zip(before, after, strict=True)) / len(prompts)
    assert exact / 2 == pytest.approx(kl, rel=0.25)


@pytest.mark.parametrize("family", FAMILIES)
def test_tasks_may_be_measured_on_sampled_answers(family: str, pico_folders, tmp_path) -> None:
    more = {"fisher.labels": "sampled", "order": "topic,question"}
    first = run(keys_for(pico_folders[family], tmp_path / "a", **more))
    again = run(keys_for(pico_folders[family], tmp_path / "b", **more))
    given = run(keys_for(pico_folders[family], tmp_path / "c", order="topic,question"))
    assert first["raw_coefficients"] == again["raw_coefficients"] != given["raw_coefficients"]
    assert first["losses"][0] == pytest.approx(given["losses"][0])  # the loss is that of the given answers


def test_prompts_in_every_shape(pico_folders, tmp_path) -> None:
    (tmp_path / "chat.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "how are you ?"}]})
        + "\n"
        + json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    )
    (tmp_path / "alpaca.jsonl").write_text(json.dumps({"instruction": "say it", "input": "loud"}))
    from pm_llm.tasks.problems import Problems
    from pm_llm.tasks.user import rows_or_prompts

    problems = Problems()
    files = [
        str(tmp_path / "chat.jsonl"),
        {"data": str(tmp_path / "alpaca.jsonl"), "prompt": "{instruction}: {input}"},
    ]
    chats, plain = rows_or_prompts(files, None, problems)
    problems.check()
    assert [row.completion for row in chats.train] == ["", "b"]
    assert [row.messages[-1]["content"] for row in chats.train] == ["how are you ?", "a"]
    assert plain.train[0].body == "say it: loud"
    (alpaca,) = rows_or_prompts(str(tmp_path / "alpaca.jsonl"), None, problems)
    problems.check()
    assert alpaca.train[0].body == "say it\n\nloud"


def test_keys_of_the_beginning(tmp_path, capsys) -> None:
    assert fetched(str(foreign("llama", tmp_path / "x" / "y").parent), subfolder="y").endswith("x/y")
    assert main(["run", "--adapter.samples", "3"]) == 2
    assert "unknown key 'adapter.samples'" in capsys.readouterr().err
    for text in ("adapter: some/adapter", "adapter: {path: some/adapter}"):
        (tmp_path / "recipe.yaml").write_text(text)
        assert load_config(tmp_path / "recipe.yaml", {"adapter.revision": "v1"}).adapter.path == "some/adapter"

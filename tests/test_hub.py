"""Pushing a real run to a loopback Hub and loading it from there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from pm_llm.cli import main
from pm_llm.config import load_config
from pm_llm.report.card import _serving, write_card
from pm_llm.report.hub import Target, is_hub_id, push_run
from pm_llm.run.record import Results
from pm_llm.sequence import ContinualSequence
from tests.conftest import FAMILIES, pm_llm, small_tasks
from tests.helpers.forks import Forker
from tests.helpers.hub import environment
from tests.helpers.hub_server import TOKEN, HubServer


@pytest.fixture(scope="module")
def finished_runs(pico_folders, tmp_path_factory) -> dict[str, str]:
    """A finished two-task run of each family."""
    runs = {}
    for family in FAMILIES:
        out = str(tmp_path_factory.mktemp("runs") / family)
        overrides = {"model": pico_folders[family], "output_dir": out, "train.max_steps": 3, "fisher.samples": 4}
        config = load_config(None, {**overrides, "max_length": 96, "lora.r": 4, "train.learning_rate": 0.01})
        ContinualSequence(config, small_tasks("sentiment", "topic")).run()
        runs[family] = out
    return runs


LOAD = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
base, family, *adapters = sys.argv[1:]
auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
ids = torch.arange(3, 20)[None]
extra = {"decoder_input_ids": ids[:, :4]} if family == "t5" else {}
for adapter in adapters:
    model = PeftModel.from_pretrained(auto.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        print("sum", model(input_ids=ids, **extra).logits.double().sum().item())
"""


def logit_sums(base: str, family: str, *adapters: str, env: dict[str, str]) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, base, family, *adapters], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [float(x) for x in re.findall(r"^sum (.*)$", done.stdout, re.M)]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "large"), [("llama", (".safetensors",)), ("t5", ())])
def test_push_and_load_again(family: str, large: tuple[str, ...], finished_runs, pico_folders, tmp_path) -> None:
    with HubServer(large) as hub:
        # with a file that goes through LFS the plain protocol is used; small files need none
        env = environment(hub, tmp_path, **({"HF_HUB_DISABLE_XET": "1"} if large else {}))
        with Forker(tmp_path, env) as forker:
            done = forker(
                "push", finished_runs[family], "user/my-adapter", "--base-model", "org/base", "--private", kill=120.0
            )
            assert done.status == 0, done.said
            repo, files = hub.repos["user/my-adapter"], hub.files["user/my-adapter"]
            assert repo.get("private") or repo.get("visibility") == "private"
            assert set(files) >= {"adapter_config.json", "adapter_model.safetensors", "README.md"}
            for text in (done.said, files["README.md"].decode()):
                assert TOKEN not in text
            local = f"{finished_runs[family]}/adapter"
            sums = logit_sums(pico_folders[family], family, "user/my-adapter", local, env=env)
            assert len(sums) == 2
            assert sums[0] == sums[1]
            assert any(r.startswith("GET /user/my-adapter/resolve/main/adapter_model") for r in hub.requests)
            again = forker("push", finished_runs[family], "user/my-adapter", "--base-model", "org/base", kill=120.0)
            assert again.status == 0, again.said  # pushing to what exists is an update


@pytest.mark.slow
def test_refused_login_is_one_line_without_the_token(finished_runs, tmp_path) -> None:
    with HubServer() as hub:
        wrong = TOKEN + "x"
        env = environment(hub, tmp_path, HF_TOKEN=wrong, HF_HUB_DISABLE_XET="1")
        done = pm_llm("push", finished_runs["llama"], "user/name", "--base-model", "org/base", env=env, timeout=120)
    assert done.returncode == 2
    assert "hf auth" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert wrong not in done.stderr + done.stdout


def test_dry_run_sends_nothing_and_shows_the_card(finished_runs, tmp_path) -> None:
    before = sorted(str(path) for path in Path(finished_runs["llama"]).rglob("*"))
    push = ("push", finished_runs["llama"], "user/name", "--dry-run")
    with HubServer() as hub:
        env = environment(hub, tmp_path)
        done = pm_llm(*push, env=env)
        assert done.returncode == 2
        assert "Name its id on the Hub with --base-model" in done.stderr
        done = pm_llm(*push, "--base-model", "org/base", env=env)
        assert done.returncode == 0, done.stderr
        assert hub.requests == []
    assert sorted(str(path) for path in Path(finished_runs["llama"]).rglob("*")) == before
    card, _, _ = done.stdout.partition("\ndry run: ")
    check_card(card, finished_runs["llama"])


@pytest.mark.slow
def test_pushing_again_keeps_what_is_the_users(finished_runs, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_runs["llama"], run, symlinks=True)
    push = ("push", str(run), "user/name", "--base-model", "org/base")
    with HubServer() as hub:
        env = environment(hub, tmp_path, HF_HUB_DISABLE_XET="1")
        with Forker(tmp_path, env) as forker:
            assert forker(*push, kill=120.0).status == 0
            files = hub.files["user/name"]
            config = json.loads(files["adapter_config.json"])
            assert config["base_model_name_or_path"] == "org/base"
            assert str(tmp_path) not in files["adapter_config.json"].decode() + files["README.md"].decode()
            edited = files["README.md"].decode().replace("---\n", "---\nlicense: mit\n", 1)
            edited = edited.replace("To be filled in", "Rows of my own. To be filled in")
            files["README.md"] = edited.replace("average accuracy", "AVERAGE").encode()
            assert forker(*push, kill=120.0).status == 0
            found = files["README.md"].decode()
            assert "license: mit" in found
            assert "Rows of my own." in found
            assert "AVERAGE" not in found
            (run / "README.md").write_text((run / "README.md").read_text() + "\nSaid here.\n")
            assert forker(*push, kill=120.0).status == 0
            assert files["README.md"].decode().rstrip().endswith("Said here.")
            assert "damaged" not in forker("status", str(run), kill=120.0).said
            (run / "README.md").unlink()
            hub.broken = "/resolve/"  # the card cannot be seen: nothing is put in its place
            before = files["README.md"]
            refused = forker(*push, kill=120.0)
            assert refused.status == 2
            assert "the Hub did not take user/name" in refused.said
            assert files["README.md"] == before


def test_names_that_a_card_cannot_hold(finished_runs, tmp_path) -> None:
    with open(f"{finished_runs['llama']}/results.json") as file:
        results = json.load(file)
    names = {"sentiment": "law & order", "topic": "<b>a|b</b>"}
    results |= {key: [names[name] for name in results[key]] for key in ("tasks", "stages")}
    card = write_card(Results.of(results), "user/name", "gpt2", 4, None, tmp_path / "README.md")
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    (index,) = yaml.safe_load(head)["model-index"]
    assert [one["dataset"]["type"] for one in index["results"]] == ["law-order", "b-a-b-b"]
    assert "<b>" not in body
    (header,) = [line for line in body.splitlines() if line.startswith("| after |")]
    assert header.replace("\\|", "").count("|") == 6


@pytest.mark.parametrize(
    "name", ["gpt2", "t5-large", "org/model-1.5", "embedded:llama", "/models/mine", "./x", "a/b/c"]
)
def test_what_can_be_a_model_on_the_hub(name: str) -> None:
    assert is_hub_id(name) == (name in ("gpt2", "t5-large", "org/model-1.5"))


def check_card(card: str, run: str) -> None:
    """The whole card against what the run says."""
    with open(f"{run}/results.json") as file:
        results = json.load(file)
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    data = yaml.safe_load(head)
    assert data["library_name"] == "peft"
    assert set(data["tags"]) >= {"pm_llm", "lora", "continual-learning"}
    (index,) = data["model-index"]
    values = {r["dataset"]["name"]: r["metrics"][0]["value"] for r in index["results"]}
    last = results["matrix"][-1]
    assert values == {t: round(v, 2) for t, v in zip(results["tasks"], last, strict=True)}
    pattern = (
        r"\s*<!-- made by pm_llm[^\n]*-->\n# name\n.*\n## Method\n\n"
        r"`pm_curvature` \(start: fresh, constrain: curvature \(weight 0.3\), merge: optimal \(.*\)\).*coefficients: "
        r"sentiment 1\.000, topic \d\.\d{3}\..*\n## Results\n.*"
        r"\| after \| sentiment \| topic \| average \| coefficient \|"
        r".*average accuracy: \d.*\n## Use\n.*PeftModel\.from_pretrained\(base, \"user/name\"\).*"
        r"vllm serve org/base --enable-lora --max-lora-rank 8 --lora-modules name=user/name\n"
        r".*\n## Licence and data\n\nTo be filled in.*"
    )
    assert re.fullmatch(pattern, body, re.S), body


def test_vllm_flag_is_an_allowed_rank() -> None:
    assert "--max-lora-rank 256" in _serving("u/n", "base", 240, "CAUSAL_LM")
    assert "--max-lora-rank 16" in _serving("u/n", "base", 16, "CAUSAL_LM")
    assert "vllm serve" not in _serving("u/n", "base", 960, "CAUSAL_LM")
    assert "vllm serve" not in _serving("u/n", "base", 16, "SEQ_2_SEQ_LM")


def test_a_card_says_whose_rows_were_trained_on(finished_runs, tmp_path) -> None:
    with open(f"{finished_runs['llama']}/results.json") as file:
        results = json.load(file)
    for kept, said in ((False, "without keeping old data"), (True, "with rows of earlier tasks")):
        found = Results.of({**results, "facts": {**results["facts"], "keeps_rows": kept}})
        card = write_card(found, "user/name", "gpt2", 4, None, tmp_path / "README.md")
        assert f"fine-tuned on 2 tasks one after the other, {said}:\nsentiment, topic." in card
    assert results["facts"] == {"is_preset": True, "keeps_rows": False, "knows_task": False}


def test_adapters_for_one_task_each_are_not_pushed_as_one(pico_folders, tmp_path, capsys) -> None:
    keys = {"model": pico_folders["llama"], "output_dir": str(tmp_path / "run"), "method": "per_task"}
    config = load_config(None, {**keys, "train.max_steps": 1, "max_length": 96})
    ContinualSequence(config, small_tasks("sentiment", "topic")).run()
    assert main(["push", str(tmp_path / "run"), "user/name", "--dry-run"]) == 2
    assert "an adapter for each task, in stages/*/task_adapter" in capsys.readouterr().err
    assert not (tmp_path / "run" / "README.md").exists()
    ContinualSequence(replace(config, output_dir=str(tmp_path / "one")), small_tasks("topic")).run()
    assert "would upload to user/name" in push_run(
        tmp_path / "one", Target("user/name", dry_run=True), base_model="org/base"
    )  # its only one


def test_bad_names_and_unfinished_runs(finished_runs, tmp_path, capsys) -> None:
    for arguments, expected in (
        ((finished_runs["llama"], "no spaces/here"), "no repository name"),
        ((finished_runs["llama"], "nouser"), "names no user"),
        ((tmp_path, "user/name"), "not a run folder"),
    ):
        capsys.readouterr()
        assert main(["push", *map(str, arguments)]) == 2
        said = capsys.readouterr().err
        assert expected in said
        assert len(said.strip().splitlines()) == 1

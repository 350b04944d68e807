"""Bad input: one clear line, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from transformers import BertConfig, BertLMHeadModel, MambaConfig

from pm_llm.adapters.adapter import Adapter
from pm_llm.cli import main
from pm_llm.config import load_config
from pm_llm.errors import NonFiniteLossError, PmLlmError
from pm_llm.merges.merger import Merger
from pm_llm.presets import PRESETS
from pm_llm.sequence import ContinualSequence
from pm_llm.session import Watcher
from pm_llm.tasks.base import Example, Task, checked
from tests.conftest import ROOT, make_peft, pm_llm, small_tasks
from tests.helpers.errors import one_line


@pytest.mark.parametrize("damage", ["cut", "other sizes"])
def test_a_damaged_base_model(damage: str, run, pico_folders, tmp_path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(pico_folders["llama"], folder)
    if damage == "cut":
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 17}))
    one_line(*run("--model", folder), "cannot load the model", "base")


def test_a_model_that_cannot_generate(run, tmp_path, pico_folders) -> None:
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=64
    )
    BertLMHeadModel(config).save_pretrained(tmp_path / "bert")
    for file in Path(pico_folders["llama"]).glob("token*"):
        shutil.copy(file, tmp_path / "bert")
    one_line(*run("--model", tmp_path / "bert"), "'bert'", "neither a decoder nor an encoder-decoder")


def test_a_model_without_a_key_value_cache(run, tmp_path, pico_folders) -> None:
    MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64).save_pretrained(tmp_path / "mamba")
    for file in Path(pico_folders["llama"]).glob("token*"):
        shutil.copy(file, tmp_path / "mamba")
    one_line(*run("--model", tmp_path / "mamba"), "'mamba'", "keeps no key-value cache")


def test_a_model_that_is_not_there(run, tmp_path) -> None:
    one_line(*run("--model", tmp_path / "nothing"), "cannot load the model")


def test_target_modules_that_match_nothing(run) -> None:
    one_line(*run("--lora.target_modules", "query"), "query", "match nothing", "q_proj")


def test_target_modules_that_cannot_be(run) -> None:
    one_line(*run("--lora.target_modules", "[("), "lora.target_modules: '[(' is no pattern", "unterminated")
    one_line(*run("--lora.target_modules", "mlp"), "lora.target_modules ['mlp']", "LlamaMLP", "is no linear layer")
    one_line(*run("--lora.target_modules", "lm_head"), "`lm_head` is not supported", "Remove")
    assert run()[0] == 0


def test_a_pattern_of_modules_and_layers(run) -> None:
    words = ("--lora.target_modules", ".*_proj", "--lora.layers_to_transform", "[1]")
    one_line(*run(*words), "layers_to_transform [1]", "a pattern", "('.*_proj')", "Write the layers into the pattern")
    assert run(*words[:2])[0] == 0


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("name", "text"), [("t.jsonl", ""), ("t.jsonl", "\n\n"), ("t.csv", "prompt,completion\n")])
def test_a_task_without_rows(name: str, text: str, run, tmp_path) -> None:
    (tmp_path / name).write_text(text)
    one_line(*run("--tasks", tmp_path / name), "task 't' has no train rows")
    assert not (tmp_path / "run").exists()


def test_a_test_split_without_rows() -> None:
    with pytest.raises(PmLlmError, match="task 'a' has no test rows"):
        checked([Task("a", [Example("x", "y")], [])])


def test_a_failed_start_can_be_corrected(run, tmp_path) -> None:
    one_line(*run("--lora.target_modules", "query"), "match nothing")
    assert run()[0] == 0


def test_other_tasks_in_the_same_folder(pico_folders, tmp_path) -> None:
    overrides = {"model": pico_folders["llama"], "output_dir": str(tmp_path / "run"), "train.max_steps": 1}
    config = load_config(None, {**overrides, "fisher.samples": 2, "max_length": 96})
    ContinualSequence(config, small_tasks("sentiment")).run()
    with pytest.raises(PmLlmError, match=r"its tasks: \['sentiment'\] -> \['topic'\]"):
        ContinualSequence(config, small_tasks("topic")).run()


def test_perturb_with_continue_is_refused(run) -> None:
    one_line(*run("--method", "pm", "--start", "continue"), "would perturb the past tasks too")


def test_a_target_module_may_be_a_plain_word(run, tmp_path) -> None:
    (tmp_path / "r.yaml").write_text("lora: {target_modules: q_proj}\n")
    assert run("--config", tmp_path / "r.yaml")[0] == 0


@pytest.mark.parametrize("rule", ["sum", "replace", "constant"])
def test_weights_that_are_not_finite_are_never_merged(rule: str) -> None:
    good = Adapter.from_model(make_peft("llama", random_b=True), "default")
    name = next(iter(good.factors))
    bad = good.replace_factors({**good.factors, name: good.factors[name].scale(float("nan"))})
    with pytest.raises(PmLlmError, match=f"the new adapter has weights that are NaN.*{name}"):
        Merger(rule).fold(good, bad)
    with pytest.raises(PmLlmError, match="the running adapter"):
        Merger(rule).fold(bad, good)


def test_an_empty_label(run, tmp_path) -> None:
    rows = [{"prompt": f"p{i}", "completion": "" if i == 2 else "x"} for i in range(20)]
    train, test = jsonl(tmp_path / "train.jsonl", rows), jsonl(tmp_path / "test.jsonl", rows[:1])
    task = yaml.safe_dump({"data": str(train), "test_data": str(test)}, default_flow_style=True).strip()
    one_line(*run("--tasks", task), f"{train}:3: its answer (completion or label) is empty")


def test_wrong_columns(run, tmp_path) -> None:
    rows = [{"story": "a", "moral": "b"}] * 20
    one_line(*run("--tasks", jsonl(tmp_path / "t.jsonl", rows)), "t.jsonl:1", "story, moral", "`completion`")


def test_run_folder_of_another_configuration(run, tmp_path, monkeypatch) -> None:
    own = ("--method", "pm")
    assert run(*own)[0] == 0
    before = sorted((tmp_path / "run").rglob("*"))
    one_line(*run(*own, "--train.learning_rate", "0.5"), "another configuration", "train.learning_rate: 0.001 -> 0.5")
    assert sorted((tmp_path / "run").rglob("*")) == before
    assert run(*own)[0] == 0  # the same configuration is welcome
    monkeypatch.setitem(PRESETS, "pm", PRESETS["pm_gaussian"])  # the preset as another version has it
    one_line(*run(*own), "another configuration", "constrain: ['perturb'] -> ['gaussian']")


def test_a_folder_that_holds_something_else(run, tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("dear")
    one_line(*run(), "is not empty and holds no run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("name", ["stages/notes.txt", "config.yaml"])
def test_files_of_others_under_our_names_are_left_alone(name: str, run, tmp_path) -> None:
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text("dear")
    one_line(*run(), "is not empty and holds no run")
    assert file.read_text() == "dear"


def test_a_start_killed_before_its_state_was_written(run, tmp_path) -> None:
    (tmp_path / "run/stages").mkdir(parents=True)
    (tmp_path / "run/.state.json.tmp").write_text("{")
    assert run()[0] == 0


def test_nan_loss_stops_the_run(run, tmp_path) -> None:
    out = tmp_path / "nan"
    # a scaling that overflows float32 in the first step
    arguments = ["--output_dir", out, "--lora.lora_alpha", 10**40, "--train.max_steps", "6"]
    code, error = run(*arguments, "--train.max_grad_norm", "0", "--train.logging_steps", "1")
    one_line(code, error, "NaN or infinite", "learning rate")
    assert not (out / "adapter").exists()
    assert list((out / "stages").iterdir()) == []


def test_nan_in_a_later_task_keeps_the_adapter_of_the_first(pico_folders, tmp_path) -> None:
    overrides = {"model": pico_folders["llama"], "output_dir": str(tmp_path / "run"), "train.max_steps": 2}
    config = load_config(None, {**overrides, "fisher.samples": 2, "max_length": 96, "train.logging_steps": 1})
    kept = []

    class Poison(Watcher):
        @contextmanager
        def training(self, stage):
            if stage.number == 2:
                kept.append((tmp_path / "run/adapter/adapter_model.safetensors").read_bytes())
                for name, p in stage.session.model.named_parameters():
                    if ".task." in name:
                        p.data.fill_(float("nan"))
            yield

    sequence = ContinualSequence(config, small_tasks("sentiment", "topic"), watchers=[Poison()])
    with pytest.raises(NonFiniteLossError, match="running adapter is untouched"):
        sequence.run()
    assert (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes() == kept[0]
    assert all(torch.isfinite(x.B).all() for x in Adapter.load(tmp_path / "run/adapter").factors.values())
    assert len(json.loads((tmp_path / "run/state.json").read_text())["stages"]) == 1


def test_no_write_permission() -> None:
    """As a user without rights on the folder (root may write anywhere)."""
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR | stat.S_IROTH | stat.S_IXOTH | stat.S_IRGRP | stat.S_IXGRP)
        # heavy modules are imported before the change of user, whose rights may not reach them
        code = (
            "import os, sys\nimport pm_llm.sequence, pm_llm.report\nfrom pm_llm.cli import main\n"
            "if os.getuid() == 0: os.setuid(65534)\n"
            "sys.exit(main(['run', '--benchmark', 'embedded', '--output_dir', sys.argv[1] + '/run']))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        one_line(done.returncode, done.stderr, "cannot write to", "choose another output_dir")
    finally:
        folder.chmod(0o700)
        shutil.rmtree(folder)


# ---- merge ----
@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> Path:
    """Adapter folders of several kinds."""
    root = tmp_path_factory.mktemp("adapters")

    def save(name: str, family: str = "llama", base: str = "org/base", seed: int = 0, **options) -> None:
        model = make_peft(family, seed=seed, random_b=True, **options)
        model.peft_config["default"].base_model_name_or_path = base
        model.save_pretrained(root / name)

    save("a")
    save("b", seed=1)
    save("other_base", base="org/other")
    save("other_targets", target_modules=["k_proj"])
    save("dora", use_dora=True)
    save("lora_bias", lora_bias=True)
    save("saved", modules_to_save=["lm_head"])
    save("bias", bias="lora_only")
    save("embedding", target_modules=["embed_tokens"])
    (root / "damaged").mkdir()
    shutil.copy(root / "a/adapter_config.json", root / "damaged")
    (root / "damaged/adapter_model.safetensors").write_bytes(b"not tensors")
    return root


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        ("other_base", ("different base models", "org/base", "org/other")),
        ("other_targets", ("different target modules", "k_proj", "q_proj")),
        ("dora", ("use_dora",)),
        ("lora_bias", ("lora_bias",)),
        ("saved", ("modules_to_save",)),
        ("bias", ("bias",)),
        ("embedding", ("embed_tokens", "linear")),
        ("damaged", ("damaged",)),
        ("absent", ("adapter_config.json is missing",)),
    ],
)
def test_merge_refuses(new, expected, adapters, tmp_path, capsys) -> None:
    code = main(
        ["merge", "--running", str(adapters / "a"), "--new", str(adapters / new), "--out", str(tmp_path / "c")]
    )
    one_line(code, capsys.readouterr().err, *expected)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("who", "keys"),
    [
        ("null_space", ("--method", "inflora")),
        ("orthogonal", ("--method", "slao")),
        ("subspace", ("--method", "pm", "--constrain", "none", "--start", "{name: subspace, init: eva}")),
        ("subspace", ("--method", "pm", "--constrain", "none", "--start", "{name: subspace, init: corda}")),
        ("subspace", ("--method", "pissa")),
        ("subspace", ("--method", "pissa", "--start", "{name: subspace, init: olora}")),
    ],
)
def test_a_basis_of_inputs_has_no_more_directions_than_these(run, who, keys) -> None:
    one_line(*run(*keys, "--lora.r", "100", "--max_rank", "none"), f"{who}: ", "the rank 100", "Lower lora.r")


def test_merge_and_compress_on_a_full_disk(adapters, tmp_path, capsys) -> None:
    a, out = str(adapters / "a"), str(tmp_path / "c")
    assert main(["compress", "--adapter", a, "--budget", "0.5", "--out", str(tmp_path / "small")]) == 0
    before, limits = set(tmp_path.iterdir()), resource.getrlimit(resource.RLIMIT_FSIZE)
    for arguments in (
        ["merge", "--running", a, "--new", str(adapters / "b")],
        ["compress", "--adapter", a, "--budget", "1"],
        ["compress", "--adapter", str(tmp_path / "small"), "--expand"],
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
        try:
            code = main([*arguments, "--out", out])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        one_line(code, capsys.readouterr().err, f"cannot write {out}")
        assert set(tmp_path.iterdir()) == before


def test_a_state_of_some_other_program_above_an_adapter(adapters, tmp_path) -> None:
    shutil.copytree(adapters / "a", tmp_path / "work/a")
    (tmp_path / "state.json").write_text('{"stages": 1}')
    a = str(tmp_path / "work/a")
    assert main(["merge", "--running", a, "--new", str(adapters / "b"), "--out", str(tmp_path / "c")]) == 0


def test_merge_refuses_to_overwrite_and_bad_rank(adapters, tmp_path, capsys) -> None:
    arguments = ["merge", "--running", str(adapters / "a"), "--new", str(adapters / "b")]
    one_line(main([*arguments, "--out", str(adapters / "a")]), capsys.readouterr().err, "exists")
    out = ["--out", str(tmp_path / "c"), "--max-rank", "0"]
    one_line(main([*arguments, *out]), capsys.readouterr().err, "max_rank is 0")
    out = ["--out", str(tmp_path / "c"), "--coefficient", "nan"]
    one_line(main([*arguments, *out]), capsys.readouterr().err, "finite number")


def test_the_process_exits_with_two(tmp_path) -> None:
    done = pm_llm("run", "--config", tmp_path / "nowhere.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith("pm-llm: error: cannot read the configuration")
    assert len(done.stderr.strip().splitlines()) == 1

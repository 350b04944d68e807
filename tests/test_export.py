"""A run's result for other programs: each export is loaded again, and what it says is compared."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

from pm_llm.adapters.adapter import Adapter
from pm_llm.adapters.gguf_file import read_gguf, write_gguf
from pm_llm.algebra.lowrank import LowRank
from pm_llm.cli import main
from pm_llm.config import load_config
from pm_llm.errors import PmLlmError
from pm_llm.report.export import add_to_weights
from pm_llm.sequence import ContinualSequence
from tests.conftest import FAMILIES, make_model, make_peft, pm_llm, small_tasks
from tests.helpers.forks import Forker
from tests.helpers.hub import environment
from tests.helpers.hub_server import HubServer


@pytest.fixture(scope="module")
def runs(pico_folders, tmp_path_factory) -> dict[str, Path]:
    """A finished run of each family, on a base with a chat template and generation settings of its own."""
    found = {}
    for family in FAMILIES:
        root = tmp_path_factory.mktemp("export") / family
        base = shutil.copytree(pico_folders[family], root / "base")
        words = AutoTokenizer.from_pretrained(base)
        words.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
        words.save_pretrained(base)
        GenerationConfig(temperature=0.25, top_k=7, do_sample=True, eos_token_id=1).save_pretrained(base)
        keys = {"model": str(base), "output_dir": str(root / "run"), "max_length": 96, "fisher.samples": 4}
        keys |= {"train.max_steps": 3, "train.learning_rate": 0.02, "lora.r": 4, "method": "pm"}
        ContinualSequence(load_config(None, keys), small_tasks("sentiment", "topic")).run()
        found[family] = root / "run"
    return found


def logits(model, family: str) -> torch.Tensor:
    ids = torch.arange(3, 20)[None]
    more = {"decoder_input_ids": ids[:, :4]} if family == "t5" else {}
    with torch.no_grad():
        return model.eval()(input_ids=ids, **more).logits.float()


def of_run(run: Path, family: str) -> torch.Tensor:
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    return logits(PeftModel.from_pretrained(auto.from_pretrained(run.parent / "base"), run / "adapter"), family)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model(family: str, runs, tmp_path, capsys) -> None:
    run, out = runs[family], tmp_path / "out"
    assert main(["export", str(run), "--as", "model", "--out", str(out)]) == 0
    assert "a model in float32" in capsys.readouterr().out
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    model = auto.from_pretrained(out)
    torch.testing.assert_close(logits(model, family), of_run(run, family), rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(out).chat_template == "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    settings = GenerationConfig.from_pretrained(out)
    assert (settings.temperature, settings.top_k, settings.do_sample) == (0.25, 7, True)


def test_a_model_in_shards_and_bfloat16(runs, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("pm_llm.report.export.SHARD", "40KB")
    out = tmp_path / "out"
    assert main(["export", str(runs["llama"]), "--as", "model", "--out", str(out), "--dtype", "bfloat16"]) == 0
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_an_adapter(dtype: str | None, runs, tmp_path) -> None:
    """One rank over all modules, no patterns, no dropout, readable, in the type that was asked for."""
    out = tmp_path / "out"
    words = ["export", str(runs["llama"]), "--as", "adapter", "--out", str(out), "--base-model", "org/base"]
    before = os.umask(0o022)
    try:
        assert main([*words, *(["--dtype", dtype] if dtype else [])]) == 0
    finally:
        os.umask(before)
    tensors, config = (
        load_file(out / "adapter_model.safetensors"),
        json.loads((out / "adapter_config.json").read_text()),
    )
    assert {x.dtype for x in tensors.values()} == {getattr(torch, dtype or "float32")}
    ranks = {x.shape[0] if ".lora_A." in name else x.shape[1] for name, x in tensors.items()}
    assert ranks == {config["r"]} == {config["lora_alpha"]}
    assert (config["rank_pattern"], config["alpha_pattern"], config["lora_dropout"]) == ({}, {}, 0.0)
    assert config["base_model_name_or_path"] == "org/base"
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o644 for p in out.iterdir())
    model = PeftModel.from_pretrained(make_model("llama"), out)
    tolerance = 1e-5 if dtype is None else 5e-2
    torch.testing.assert_close(logits(model, "llama"), of_run(runs["llama"], "llama"), rtol=tolerance, atol=tolerance)


def test_a_gguf_file(runs, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["export", str(runs["llama"]), "--as", "gguf", "--out", str(out)]) == 0
    found = re.search(r"read again by llama.cpp's rule it is (\S+) off", capsys.readouterr().out)
    assert float(found[1]) < 1e-6
    import gguf

    reader = gguf.GGUFReader(str(out / "adapter.gguf"))
    assert {t.name for t in reader.tensors} == {
        f"blk.{i}.attn_{side}.weight.lora_{ab}" for i in (0, 1) for side in "qv" for ab in "ab"
    }
    text = {key: bytes(reader.fields[key].parts[-1]).decode() for key in ("general.type", "adapter.type")}
    assert text == {"general.type": "adapter", "adapter.type": "lora"}
    assert main(["export", str(runs["t5"]), "--as", "gguf", "--out", str(tmp_path / "t5")]) == 2
    assert "tensors of a 't5' model is not known here" in capsys.readouterr().err
    assert not (tmp_path / "t5").exists()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_mixed_ranks_and_the_order_of_rows(dtype: str, tmp_path) -> None:
    """The scale is right for every rank, and rows of q and k stand in llama.cpp's order: neighbours are a pair."""
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
    model = make_peft("llama", random_b=True, target_modules=modules, rank_pattern={"v_proj": 2})
    adapter, config = Adapter.from_model(model, "default"), model.config
    write_gguf(adapter, config, tmp_path / "a.gguf", dtype)
    again = read_gguf(tmp_path / "a.gguf", adapter, config)
    tolerance = {"float32": 1e-6, "float16": 1e-2, "bfloat16": 5e-2}[dtype]
    for name, x in adapter.factors.items():
        torch.testing.assert_close(again.factors[name].dense(), x.dense(), rtol=tolerance, atol=tolerance)
    import gguf

    tensors = {t.name: t for t in gguf.GGUFReader(str(tmp_path / "a.gguf")).tensors}
    for letter, heads in (("q", 4), ("k", 2)):
        found = tensors[f"blk.0.attn_{letter}.weight.lora_b"]
        rows = torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type).copy())
        ours = adapter.of_one_rank().factors[f"model.layers.0.self_attn.{letter}_proj"].B
        head = len(ours) // heads
        order = [h * head + half * head // 2 + i for h in range(heads) for i in range(head // 2) for half in (0, 1)]
        torch.testing.assert_close(rows, ours[order], rtol=tolerance, atol=tolerance)


def test_what_cannot_be_exported(runs, tmp_path, capsys) -> None:
    run, out = str(runs["llama"]), str(tmp_path / "out")
    for words, error in (
        (["--as", "onnx"], "--as is 'onnx'; it must be adapter, model, gguf"),
        (["--as", "model", "--dtype", "int8"], "--dtype is 'int8'; it must be float32, bfloat16, float16"),
    ):
        assert main(["export", run, *words, "--out", out]) == 2
        assert error in capsys.readouterr().err
        assert not Path(out).exists()
    model = make_model("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    head = Adapter({"lm_head": LowRank(torch.ones(1024, 1), torch.ones(1, 32))})
    with pytest.raises(PmLlmError, match="lm_head shares its weights"):
        add_to_weights(model, head)


def test_merge_keeps_the_type_of_its_inputs(tmp_path) -> None:
    for name, dtype in (("a", torch.bfloat16), ("b", torch.bfloat16), ("c", torch.float32)):
        make_peft("llama", random_b=True, seed=ord(name)).save_pretrained(tmp_path / name)
        file = tmp_path / name / "adapter_model.safetensors"
        save_file({k: x.to(dtype) for k, x in load_file(file).items()}, file)

    def merged(other: str, *more: str) -> torch.dtype:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        words = ["merge", "--running", tmp_path / "a", "--new", tmp_path / other, "--out", out, *more]
        assert main([str(word) for word in words]) == 0
        (found,) = {x.dtype for x in load_file(out / "adapter_model.safetensors").values()}
        return found

    assert merged("b") == torch.bfloat16
    assert merged("c") == torch.float32
    assert merged("b", "--dtype", "float16") == torch.float16
    assert (
        main(["compress", "--adapter", str(tmp_path / "c"), "--out", str(tmp_path / "small"), "--budget", "0.6"]) == 0
    )
    words = ["compress", "--expand", "--adapter", tmp_path / "small", "--out", tmp_path / "big", "--dtype", "bfloat16"]
    assert main([str(word) for word in words]) == 0
    assert {x.dtype for x in load_file(tmp_path / "big" / "adapter_model.safetensors").values()} == {torch.bfloat16}


def test_weights_that_a_type_cannot_hold(tmp_path) -> None:
    large = Adapter({"x.q_proj": LowRank(torch.full((4, 1), 1e6), torch.ones(1, 4))}, {"target_modules": ["q_proj"]})
    with pytest.raises(PmLlmError, match="--dtype float16 cannot hold weights of this adapter"):
        large.save(tmp_path / "out", "float16")


@pytest.mark.slow
def test_folders_are_pushed_too(runs, tmp_path) -> None:
    """What export wrote, to a branch, as a pull request; a folder that names no base on the Hub is refused."""
    for kind in ("adapter", "model", "gguf"):
        assert main(["export", str(runs["llama"]), "--as", kind, "--out", str(tmp_path / kind)]) == 0
    with HubServer() as hub:
        env = environment(hub, tmp_path, HF_HUB_DISABLE_XET="1")
        with Forker(tmp_path, env) as forker:
            ended = forker("push", tmp_path / "adapter", "user/a")
            assert ended.status == 2
            assert "Name its id on the Hub with --base-model USER/NAME" in ended.said
            for kind in ("adapter", "model", "gguf"):
                ended = forker("push", tmp_path / kind, f"user/{kind}", "--base-model", "org/base")
                assert ended.status == 0, ended.said
                own = {p.name for p in (tmp_path / kind).iterdir()}
                assert set(hub.files[f"user/{kind}"]) == own | {"README.md"}
                assert b"base_model: org/base" in hub.files[f"user/{kind}"]["README.md"]
            base = ["--base-model", "org/base"]
            ended = forker("push", tmp_path / "adapter", "user/adapter", *base, "--revision", "v2")
            assert ended.status == 0, ended.said
            assert hub.branches["user/adapter"] == {"v2"}
            ended = forker("push", runs["llama"], "user/adapter", *base, "--create-pr")
            assert ended.status == 0, ended.said
            assert hub.pulls == ["user/adapter"]
            assert "/discussions/1" in ended.said
            ended = forker("push", tmp_path / "adapter", "user/adapter", *base, "--revision", "not a branch")
            assert "is no name of a branch" in ended.said
        text = json.loads(hub.files["user/adapter"]["adapter_config.json"])
        assert text["base_model_name_or_path"] == "org/base"
    assert pm_llm("push", tmp_path, "user/x").stderr.count("\n") == 1

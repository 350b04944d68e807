"""Adapters and models from elsewhere that mean harm, or are not what they say: refused in one line."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoHaConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from pm_llm.adapters.adapter import Adapter
from pm_llm.adapters.untrusted import check_files
from pm_llm.cli import main
from pm_llm.errors import PmLlmError
from pm_llm.system.sharding import weights_only
from tests.conftest import make_model, make_peft
from tests.helpers.forks import Forker
from tests.helpers.hub import environment
from tests.helpers.hub_server import HubServer

TASKS = ["--benchmark", "embedded", "--order", "topic", "--max_test_samples", "2", "--max_length", "96"]


class Harm:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def header(folder: Path, text: bytes, claimed: int | None = None) -> None:
    length = len(text) if claimed is None else claimed
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", length) + text)


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Harm(folder / "harm")))


def pickled_under_another_name(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(pickle.dumps(Harm(folder / "harm")))


def petabytes(folder: Path) -> None:
    header(folder, b"{}", claimed=10**15)


def petabytes_of_tensor(folder: Path) -> None:
    tensor = {"dtype": "F32", "shape": [10**8, 10**7], "data_offsets": [0, 4 * 10**15]}
    header(folder, json.dumps({"base_model.model.lora_A.weight": tensor}).encode())


def overlapping(folder: Path) -> None:
    tensor = {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}
    header(folder, json.dumps({"a": tensor, "b": tensor}).encode() + bytes(4))


def deep(folder: Path) -> None:
    header(folder, b"[" * 100000)


def traversal(folder: Path) -> None:
    state = load_file(folder / "adapter_model.safetensors")
    name, tensor = state.popitem()
    save_file({**state, f"../../{name}": tensor}, folder / "adapter_model.safetensors")


def configured(**keys: object):
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))

    return change


def other_shapes(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({k: torch.zeros(x.shape[0] * 2, x.shape[1] * 2) for k, x in load_file(file).items()}, file)
    configured(r=8)(folder)


def without_weights(folder: Path) -> None:
    save_file({}, folder / "adapter_model.safetensors")


# values that PEFT would take: to allocate what it is told, to match for ever, or to fail in its own words
VALUES = [
    ("rank_pattern", {"k_proj": 5 * 10**7}),
    ("rank_pattern", [1]),
    ("alpha_pattern", "x"),
    ("target_modules", 5),
    ("target_modules", [5]),
    ("target_modules", [f"m{i}" for i in range(300_000)]),
    ("layer_replication", [[0, 10**9]]),
    ("lora_alpha", "abc"),
    ("lora_dropout", "x"),
]
CASES = [
    (pickled, "adapter_model.bin is a pickle"),
    (pickled_under_another_name, "is damaged"),
    (petabytes, "is damaged"),
    (petabytes_of_tensor, "is damaged"),
    (overlapping, "is damaged"),
    (deep, "is damaged"),
    (traversal, "is not a name that PEFT gives"),
    (configured(run_this="rm -rf /"), "keys that this PEFT does not know for LORA: run_this"),
    (configured(r=10**9), "values that no adapter needs: r"),
    (configured(r=5), "do not belong together"),
    (configured(peft_type="PWN"), "peft_type is 'PWN'"),
    (configured(peft_type=["LORA"]), "peft_type is ['LORA']"),
    (configured(megatron_config={"x": 1}, megatron_core="os"), "megatron_config"),
    (other_shapes, "shape"),
    *((configured(**{key: value}), f"values that no adapter needs: {key}") for key, value in VALUES),
    (configured(rank_pattern={"(([a-z0-9_.])+)+X": 4}), "takes too long to match"),
    (configured(rank_pattern={".*" * 24 + "Z": 4}), "takes too long to match"),
    (configured(alpha_pattern={"(": 4}), "cannot be matched"),
    (configured(peft_type="XLORA"), "XLORA"),
    (without_weights, "holds no weights"),
]


@pytest.fixture
def adapter(tmp_path) -> Path:
    make_peft("llama", random_b=True).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize("pattern", [".*" * 24 + "Z", "((a+)+)+b", r"(.)\\1*(.*)*\\2Z", "("])
def test_a_pattern_for_names_that_comes_with_a_file_is_never_matched(
    key: str, pattern: str, adapter, pico_folders, tmp_path, capsys
) -> None:
    configured(**{key: pattern})(adapter)
    assert main(["evaluate", "--model", pico_folders["llama"], "--adapter", str(adapter), *TASKS]) == 0
    out = str(tmp_path / "out")
    assert main(["merge", "--running", str(adapter), "--new", str(adapter), "--out", out]) == 0
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert all(pattern != value for value in config.values())
    assert PeftModel.from_pretrained(make_model("llama"), out)


def test_patterns_as_keys_of_ranks_and_null_values_of_other_versions_are_fine(adapter, pico_folders, tmp_path) -> None:
    configured(
        rank_pattern={r".*\\.q_proj": 4}, alpha_pattern={r"model\\.layers\\.[01].*v_proj": 32}, r=4, corda_of_old=None
    )(adapter)
    found = Adapter.load(adapter)
    plain = PeftModel.from_pretrained(make_model("llama"), str(adapter))
    live = Adapter.from_model(plain, "default")
    for name, x in found.factors.items():
        torch.testing.assert_close(x.dense(), live.factors[name].dense())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("base_model.model.", "_orig_mod.base_model.model."),
        ("base_model.model.", "module.base_model.model."),
        ("base_model.model.", "base_model.model.base_model.model."),
        (".self_attn.", "._fsdp_wrapped_module.self_attn."),
        (".lora_A.", "._orig_mod.lora_A."),
    ],
)
def test_names_that_wrappers_give_are_taken_as_the_models(before: str, after: str, adapter) -> None:
    expected = Adapter.load(adapter)
    file = adapter / "adapter_model.safetensors"
    save_file({name.replace(before, after): x.clone() for name, x in load_file(file).items()}, file)
    found = Adapter.load(adapter)
    assert list(found.factors) == list(expected.factors)
    save_file({name.replace("base_model.model.", "wrapped."): x for name, x in load_file(file).items()}, file)
    with pytest.raises(PmLlmError, match="is not a name that PEFT gives"):
        Adapter.load(adapter)


def test_an_adapter_of_the_output_layer_as_peft_saves_it(tmp_path) -> None:
    model = make_peft("llama", random_b=True, target_modules=["q_proj", "lm_head"])
    model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    assert any("base_layer" in name for name in load_file(tmp_path / "a/adapter_model.safetensors"))
    assert "lm_head" in Adapter.load(tmp_path / "a").factors


@pytest.mark.parametrize(("spoil", "expected"), CASES, ids=[f"{i}" for i in range(len(CASES))])
def test_refused_by_every_command(spoil, expected: str, adapter, pico_folders, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("pm_llm.adapters.untrusted.PATIENCE", 1.0)
    shutil.copytree(adapter, tmp_path / "good")
    spoil(adapter)
    commands = {
        "evaluate": ["evaluate", "--model", pico_folders["llama"], "--adapter", str(adapter), *TASKS],
        "merge": ["merge", "--running", str(tmp_path / "good"), "--new", str(adapter), "--out", str(tmp_path / "out")],
    }
    for name, command in commands.items():
        if (name, expected) == ("evaluate", "megatron_config"):
            continue  # PEFT itself refuses it or has no use for it, by its version
        assert main(command) == 2, name
        error = capsys.readouterr().err
        assert error.count("pm-llm: error:") == 1
        assert "Traceback" not in error
        assert expected in error, error
    assert not (adapter / "harm").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("layers_to_transform", "abc"), ("task_type", "BOGUS"), ("modules_to_save", ["lm_head"]), ("arrow_config", 3)],
)
def test_what_peft_fails_at_is_one_line_too(key: str, value, adapter, pico_folders, tmp_path, capsys) -> None:
    shutil.copytree(adapter, tmp_path / "good")
    configured(**{key: value})(adapter)
    evaluate = ["evaluate", "--model", pico_folders["llama"], "--adapter", str(adapter), *TASKS]
    merge = ["merge", "--running", str(tmp_path / "good"), "--new", str(adapter), "--out", str(tmp_path / "out")]
    ends = [main(evaluate), main(merge)]
    assert set(ends) <= {0, 2}
    assert 2 in ends
    assert "Traceback" not in capsys.readouterr().err


def test_a_good_one_passes(adapter) -> None:
    assert check_files(adapter)["peft_type"] == "LORA"


@pytest.mark.parametrize("config", [IA3Config(task_type="CAUSAL_LM"), LoHaConfig(task_type="CAUSAL_LM")])
def test_half_an_adapter_of_another_kind_is_not_scored(config, pico_folders, tmp_path, capsys) -> None:
    get_peft_model(make_model("llama"), config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    save_file({name: x for name, x in weights.items() if "layers.0." in name}, tmp_path / "adapter_model.safetensors")
    assert main(["evaluate", "--model", pico_folders["llama"], "--adapter", str(tmp_path), *TASKS]) == 2
    assert "does not fit the model" in capsys.readouterr().err


def test_weights_that_do_not_fit_the_model_are_not_scored(adapter, pico_folders, capsys) -> None:
    """Of a compiled model, of fewer layers, or of more: PEFT warns at most, and the base model would answer."""
    weights = load_file(adapter / "adapter_model.safetensors")
    compiled = {name.replace("model.model.", "model._orig_mod.model."): x for name, x in weights.items()}
    fewer = {name: x for name, x in weights.items() if "layers.0." in name}
    more = weights | {name.replace("layers.1.", "layers.9."): x.clone() for name, x in weights.items()}
    for found in (compiled, fewer, more):
        save_file(found, adapter / "adapter_model.safetensors")
        assert main(["evaluate", "--model", pico_folders["llama"], "--adapter", str(adapter), *TASKS]) == 2
        assert "does not fit the model" in capsys.readouterr().err


def test_from_the_hub_too(adapter, tmp_path, pico_folders) -> None:
    configured(run_this="x")(adapter)
    with HubServer() as hub, Forker(tmp_path, environment(hub, tmp_path / "home")) as forker:
        hub.repos["user/bad"] = {}
        hub.files["user/bad"] = {path.name: path.read_bytes() for path in adapter.iterdir() if path.is_file()}
        for name, expected in (
            ("bad", "keys that this PEFT does not know"),
            ("none", "and the Hub has none of that name"),
        ):
            done = forker("evaluate", "--model", pico_folders["llama"], "--adapter", f"user/{name}", *TASKS)
            assert done.status == 2
            assert expected in done.said
            assert "Traceback" not in done.said


def test_a_model_that_wants_to_run_its_own_code(pico_folders, tmp_path, capsys) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pico_folders["llama"], folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w')")
    assert main(["run", "--model", str(folder), "--benchmark", "embedded", "--output_dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "cannot load the model" in error
    assert "Traceback" not in error
    assert not (tmp_path / "harm").exists()
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_names_files_elsewhere(tmp_path, pico_folders, capsys) -> None:
    from pm_llm.system.files import sha256_of

    (tmp_path / "run/stages").mkdir(parents=True)
    state = {"tasks": [], "config": {}, "rows": {"train": [], "test": {}}, "stages": [], "untrained": None}
    state["files"] = {"../victim/curvature.safetensors": {"size": 1, "sha256": ""}}
    (tmp_path / "run/state.json").write_text(json.dumps({**state, "digest": sha256_of(state)}))
    assert main(["status", str(tmp_path / "run")]) == 2
    assert "has other content than was written" in capsys.readouterr().err


def test_names_in_a_folder() -> None:
    with pytest.raises(PmLlmError, match="is not an adapter folder"):
        check_files(Path("/nothing"))


def test_torch_loads_no_pickle_while_a_run_trains(tmp_path) -> None:
    """Also where a library asks for one, as DeepSpeed does."""
    torch.save({"x": Harm(tmp_path / "harm")}, tmp_path / "state.pt")
    with weights_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "state.pt", weights_only=False)
    assert not (tmp_path / "harm").exists()
    torch.load(tmp_path / "state.pt", weights_only=False)
    assert (tmp_path / "harm").exists()

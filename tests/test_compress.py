"""Compressed adapters: small, ordinary again when expanded, and as near as the budget allows."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file

from pm_llm.adapters.adapter import Adapter
from pm_llm.adapters.compression import BITS, FILE, compress, dequantised, expand, packed, quantised, unpacked
from pm_llm.cli import main
from pm_llm.errors import PmLlmError
from tests.conftest import FAMILIES, batch_of, features, make_model, make_peft


@pytest.mark.parametrize("bits", BITS)
def test_codes_come_back_and_round_to_the_nearest(bits: int) -> None:
    x = torch.randn(13, 3, generator=torch.Generator().manual_seed(bits))
    codes, scales = quantised(x, bits)
    assert torch.equal(unpacked(packed(codes, bits), (13, 3), bits), codes)
    assert len(packed(codes, bits)) == -(-39 * bits // 8)
    assert ((dequantised(codes, scales) - x).abs() <= scales / 2 + 1e-6).all()
    assert int(codes.abs().max()) == 2 ** (bits - 1) - 1


@pytest.mark.parametrize("family", FAMILIES)
def test_compressed_and_expanded(family: str, tmp_path) -> None:
    model = make_peft(family, random_b=True, r=16, lora_alpha=8).eval()
    Adapter.from_model(model, "default").save(tmp_path / "whole")
    before = Adapter.load(tmp_path / "whole").factors
    errors = []
    for budget in (0.15, 0.2, 0.5):
        damage = compress(tmp_path / "whole", tmp_path / f"small{budget}", budget)
        expand(tmp_path / f"small{budget}", tmp_path / f"again{budget}")
        after = Adapter.load(tmp_path / f"again{budget}").factors
        lost = sum(float((before[n].dense() - after[n].dense()).norm() ** 2) for n in before)
        size = sum(float(before[n].dense().norm() ** 2) for n in before)
        assert damage.error == pytest.approx((lost / size) ** 0.5, rel=1e-3)
        for name, x in before.items():
            error = float((x.dense() - after[name].dense()).norm() / x.dense().norm())
            assert damage.errors[name] == pytest.approx(error, rel=1e-3)
            assert damage.ranks[name] == after[name].rank
        files = [tmp_path / which for which in ("whole/adapter_model.safetensors", f"small{budget}/{FILE}")]
        assert [damage.before, damage.after] == [file.stat().st_size for file in files]
        assert damage.after <= budget * damage.before
        errors.append(damage.error)
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.03
    batch = batch_of(family, features(family, 2))
    loaded = PeftModel.from_pretrained(make_model(family), str(tmp_path / "again0.5")).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, atol=0.05, rtol=0.05)


def test_the_command_and_what_it_refuses(tmp_path, capsys) -> None:
    Adapter.from_model(make_peft("llama", random_b=True), "default").save(tmp_path / "whole")
    arguments = ["compress", "--adapter", str(tmp_path / "whole"), "--out", str(tmp_path / "small")]
    assert main([*arguments, "--budget", "0.4"]) == 0
    assert "relative error" in capsys.readouterr().out
    assert (tmp_path / "small" / FILE).stat().st_size < (tmp_path / "whole/adapter_model.safetensors").stat().st_size
    assert main(["compress", "--expand", "--adapter", str(tmp_path / "small"), "--out", str(tmp_path / "again")]) == 0
    assert Adapter.load(tmp_path / "again").rank <= 4
    for extra, expected in ((["--budget", "0.4"], "exists"), (["--budget", "0"], "above 0")):
        assert main([*arguments, *extra]) == 2
        assert expected in capsys.readouterr().err
    with pytest.raises(PmLlmError, match="one rank in two bits"):
        compress(tmp_path / "whole", tmp_path / "tiny", 0.001)
    with pytest.raises(PmLlmError, match="no compressed"):
        expand(tmp_path / "whole", tmp_path / "other")
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize("name", [FILE, "adapter_config.json"])
@pytest.mark.parametrize("spoil", ["halve", "remove", "plain"])
def test_a_damaged_folder_is_not_expanded(name: str, spoil: str, tmp_path, capsys) -> None:
    Adapter.from_model(make_peft("llama", random_b=True), "default").save(tmp_path / "whole")
    compress(tmp_path / "whole", tmp_path / "small", 0.5)
    file = tmp_path / "small" / name
    if spoil == "halve":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif spoil == "remove":
        file.unlink()
    else:  # what it is called, and not what it should be
        save_file({"x": torch.zeros(2)}, file)
    assert main(["compress", "--expand", "--adapter", str(file.parent), "--out", str(tmp_path / "again")]) == 2
    error = capsys.readouterr().err
    assert str(file.parent) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "again").exists()


def test_where_an_adapter_sits_survives(tmp_path) -> None:
    """A pattern for its modules, and no task type, as some adapters on the Hub have it."""
    model = make_peft("llama", random_b=True, target_modules=r".*\.(q|v)_proj", r=8, layers_to_transform=None)
    Adapter.from_model(model, "default").save(tmp_path / "whole")
    config = json.loads((tmp_path / "whole/adapter_config.json").read_text())
    config["task_type"] = None
    (tmp_path / "whole/adapter_config.json").write_text(json.dumps(config))
    compress(tmp_path / "whole", tmp_path / "small", 0.5)
    expand(tmp_path / "small", tmp_path / "again")
    found = json.loads((tmp_path / "again/adapter_config.json").read_text())
    assert sorted(found["target_modules"]) == sorted(Adapter.from_model(model, "default").factors)  # no pattern
    assert found["task_type"] is None
    assert PeftModel.from_pretrained(make_model("llama"), str(tmp_path / "again"))

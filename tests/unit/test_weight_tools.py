"""The tools under mindone's names do what the commands do, and commands take their sources without flags."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from dreambooth_ms.adapters.file import open_adapter
from dreambooth_ms.cli.main import main
from dreambooth_ms.config.commands import ConvertConfig, MergeConfig
from dreambooth_ms.config.load import load
from dreambooth_ms.errors import ConfigError
from dreambooth_ms.formats.files.open import open_tensor_file
from dreambooth_ms.formats.files.stored import Container
from dreambooth_ms.formats.naming.formats import Format
from dreambooth_ms.formats.naming.lora_formats import LoraFormat
from dreambooth_ms.weights.model_writing import plan_model
from dreambooth_ms.weights.opened_model import open_model
from tests.small_specs import SMALL
from tests.torch_checkpoints import call, dict_of, named, pickle_of, tensor, text, zip_checkpoint
from tests.whole_loras import attention, write_lora_file
from tests.whole_models import values_of, write_model
from tools import bench_convert
from tools.convert_weight import translated

TOOLS = Path(__file__).parents[2] / "tools"


def tool(monkeypatch, name, *arguments):
    """The status of a tool that is run as a script."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(TOOLS / name), run_name="__main__")
    return end.value.code


class TestConvertWeight:
    @pytest.mark.parametrize(
        ("old", "new"),
        [
            (["a", "b", "--dtype", "fp16"], ["a", "b", "--dtype", "fp16"]),
            (["--task", "st_to_ms", "--weight_safetensors", "a", "--weight_ms", "b"], ["a", "b"]),
            (["--weight_safetensors", "a", "--weight_ms", "b", "--key_ms", "c", "--key_torch", "d"], ["a", "b"]),
            (["--task=ms_to_pt", "--weight_safetensors=a", "--weight_ms=b"], ["b", "a"]),
            (["--weight_ms", "b", "--weight_torch", "a", "--dtype", "bf16"], ["a", "b", "--dtype", "bf16"]),
        ],
    )
    def test_the_old_flags_say_what_is_converted_into_what(self, old, new):
        assert translated(old) == new

    def test_it_converts(self, tmp_path, monkeypatch):
        path, model = write_model(Format.STABILITY, tmp_path / "a")
        flags = ["--task", "st_to_ms", "--weight_safetensors", path, "--weight_ms", tmp_path / "b.ckpt"]
        assert tool(monkeypatch, "convert_weight.py", *flags) == 0
        assert values_of(open_model(tmp_path / "b.ckpt").tensors) == values_of(model.tensors)


def test_merge_lora_to_base_merges_and_is_told_the_alpha_that_the_file_lacks(tmp_path, monkeypatch):
    base, model = write_model(Format.MINDONE, tmp_path / "base", "sdxl")
    own = {"choose": attention, "ranks": (4,), "alphas": (4.0,)}
    lora, _ = write_lora_file(LoraFormat.MINDONE, tmp_path / "lora", "sdxl", **own)
    flags = ["--weight_base", base, "--weight_lora", lora, "--lora_config_rank", 4]
    for alpha, name in ((4, "full.ckpt"), (2, "half.ckpt")):
        more = ["--weight_merged", tmp_path / name, "--lora_config_alpha", alpha]
        assert tool(monkeypatch, "merge_lora_to_base.py", *flags, *more) == 0
    full, half = (open_model(tmp_path / name).tensors for name in ("full.ckpt", "half.ckpt"))
    layer = next(iter(open_adapter(lora, [SMALL["sdxl"]]).adapter.updates))
    before = model.tensors[f"{layer}.weight"].read()
    change = full[f"{layer}.weight"].read() - before
    assert abs(change).max() > 0.01
    assert abs(half[f"{layer}.weight"].read() - before - change / 2).max() < 1e-6


class TestCommandLines:
    def test_sources_and_targets_come_first_and_need_no_flag(self):
        config = load(ConvertConfig, ["a", "b.ckpt", "--dtype", "fp16"]).conversion
        assert (config.source, config.target, config.dtype) == ("a", "b.ckpt", "fp16")
        assert load(ConvertConfig, ["a", "--target", "b"]).conversion.target == "b"

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["a"], "--target: required"),
            (["a", "b", "c"], "unexpected 'c'"),
        ],
    )
    def test_too_few_and_too_many_are_told(self, arguments, said):
        with pytest.raises(ConfigError, match=said):
            load(ConvertConfig, arguments)

    def test_a_merge_needs_a_lora(self):
        with pytest.raises(ConfigError, match="--lora: missing; name the LoRA to merge"):
            load(MergeConfig, ["--base", "a", "--target", "b"])
        several = ["--base", "a", "--target", "b", "--lora", "c", "--lora", "d"]
        assert load(MergeConfig, several).merging.lora == ["c", "d"]


class TestPickledCheckpoints:
    @pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before 1.6"])
    @pytest.mark.parametrize("family", ["sd15", "sdxl"])
    def test_they_are_converted(self, tmp_path, family, legacy):
        path, model = write_model(Format.STABILITY, tmp_path / "a", family)
        state = {name: torch.tensor(own.read()) for name, own in open_tensor_file(path).tensors.items()}
        content = {"state_dict": state, "epoch": 3}
        torch.save(content, tmp_path / "old.ckpt", _use_new_zipfile_serialization=not legacy)
        kind = Container.TORCH_LEGACY if legacy else Container.TORCH_ZIP
        assert open_model(tmp_path / "old.ckpt").container is kind
        assert main(["convert", str(tmp_path / "old.ckpt"), str(tmp_path / "new.safetensors")]) == 0
        found = open_model(tmp_path / "new.safetensors").tensors
        expected = values_of(model.tensors)
        assert values_of({name: found[name] for name in expected}) == expected

    def test_what_a_pickle_would_run_is_not_run(self, tmp_path):
        mark = tmp_path / "mark"
        attack = call(named("os", "system"), text(f"touch {mark}"))
        value = dict_of({"model.diffusion_model.out.0.weight": tensor("0", 2, (2,)), "x": attack})
        (tmp_path / "evil.ckpt").write_bytes(zip_checkpoint(value, {"0": bytes(8)}))
        (tmp_path / "evil.bin").write_bytes(pickle_of(attack))
        for name in ("evil.ckpt", "evil.bin"):
            main(["inspect", str(tmp_path / name)])
            assert main(["convert", str(tmp_path / name), str(tmp_path / "out")]) == 2
        assert not mark.exists()
        assert not (tmp_path / "out").exists()


def test_the_benchmark_converts_to_every_format_in_little_memory(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_convert, "MODELS", {"sd15": SMALL["sd15"]})
    monkeypatch.setattr(sys, "argv", ["bench_convert", "--family", "sd15", "--folder", str(tmp_path)])
    bench_convert.main()
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("sd15 in fp16: 0.00 GB")
    assert [line.split("  ")[0].strip() for line in lines] == list(bench_convert.TARGETS)
    for line in lines:
        assert 10 < float(line.split("peak ")[1].removesuffix(" MiB")) < 300
    assert not list(tmp_path.iterdir())


def test_planning_reads_nothing(tmp_path, monkeypatch):
    path, _ = write_model(Format.STABILITY, tmp_path / "a")
    model = open_model(path)
    path.write_bytes(b"")
    assert plan_model(model, Format.DIFFUSERS).byte_count > 0

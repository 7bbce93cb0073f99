"""LoRAs of every format go to every other and mean the same: the same factors, or at least the same update."""

import json

import numpy as np
import pytest

from dreambooth_ms.adapters.file import open_adapter
from dreambooth_ms.cli.main import main
from dreambooth_ms.conversion import LORA_FORMATS
from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.open import open_tensor_file
from dreambooth_ms.formats.files.safetensors_file import write_safetensors
from dreambooth_ms.formats.naming.formats import Format
from dreambooth_ms.formats.naming.lora_formats import LoraFormat
from tests.small_specs import PUBLISHED, SMALL
from tests.whole_loras import FILES, attention, attention_and_text, delta, random_lora, write_lora_as, write_lora_file
from tests.whole_models import write_model

NAMES = {form: name for name, form in LORA_FORMATS.items()}
FAMILIES = ["sd15", "sd21", "sdxl"]
DTYPES = {"sd15": DType.F32, "sd21": DType.F16, "sdxl": DType.BF16}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A model of each family, whose sizes come from --base."""
    folder = tmp_path_factory.mktemp("bases")
    return {family: write_model(Format.STABILITY, folder / family, family)[0] for family in FAMILIES}


def convert(source, target, form, base, *flags):
    return main(["convert", str(source), str(target), "--format", NAMES[form], "--base", str(base), *flags])


def assert_same_factors(found, expected):
    found, expected = found.adapter.updates, expected.adapter.updates
    assert found.keys() == expected.keys()
    for layer, own in expected.items():
        other = found[layer]
        assert (other.rank, other.rank if other.alpha is None else other.alpha) == (own.rank, own.alpha), layer
        assert np.array_equal(other.down, own.down.astype(other.down.dtype)), layer
        assert np.array_equal(other.up, own.up.astype(other.up.dtype)), layer


def assert_same_updates(found, expected):
    """B was multiplied by alpha / r, once, and rounded to the file's type."""
    digits = {DType.F32: 1e-6, DType.F16: 2e-3, DType.BF16: 2e-2}[expected.dtype]
    for layer, own in expected.adapter.updates.items():
        wanted = delta(own)
        assert np.abs(delta(found.adapter.updates[layer]) - wanted).max() <= digits * np.abs(wanted).max(), layer


@pytest.mark.parametrize("family", FAMILIES)
def test_the_way_through_every_format_changes_no_factor_and_no_alpha(tmp_path, bases, family):
    """With scales that are powers of two: others round B where a format has them in it."""
    forms = [form for form in LoraFormat if form is not LoraFormat.MINDONE]
    path, lora = write_lora_file(LoraFormat.KOHYA, tmp_path / "0", family, dtype=DTYPES[family], alphas=(4.0, 16.0))
    for form in [*forms, LoraFormat.KOHYA, *reversed(forms)]:
        source, path = path, tmp_path / f"{len(list(tmp_path.iterdir()))}{FILES.get(form, '.safetensors')}"
        assert convert(source, path, form, bases[family]) == 0
    found = open_adapter(path, [SMALL[family]])
    assert_same_factors(found, lora)
    assert (found.dtype, found.notes) == (DTYPES[family], [])


DIFFUSERS_OWN = [LoraFormat.DIFFUSERS, LoraFormat.DIFFUSERS_PEFT, LoraFormat.DIFFUSERS_PROCESSORS]


class TestFolding:
    """In diffusers' formats every reader draws the same, also those that take alpha for the rank of any layer."""

    @pytest.mark.parametrize("form", DIFFUSERS_OWN, ids=NAMES.get)
    @pytest.mark.parametrize("alphas", [(2.0, 8.0), (1.0, 7.0)], ids=["powers of two", "others"])
    def test_the_scale_is_in_the_factors_and_comes_back(self, tmp_path, form, alphas):
        path, lora = write_lora_file(form, tmp_path / "lora", alphas=alphas)
        file, own = open_tensor_file(path), lora.adapter.updates
        settings = json.loads(file.metadata["lora_adapter_metadata"])
        for part in lora.adapter.parts:
            assert (settings[f"{part}.r"], settings[f"{part}.lora_alpha"]) == (4, 4)
            assert not settings[f"{part}.rank_pattern"]
            assert not settings[f"{part}.alpha_pattern"]
        plain = {name: value for name, value in file.metadata.items() if name != "dreambooth_ms_lora"}
        write_safetensors(tmp_path / "plain.safetensors", file.tensors, plain)
        as_others_read = open_adapter(tmp_path / "plain.safetensors", [SMALL["sd15"]])
        assert {(one.rank, one.alpha) for one in as_others_read.adapter.updates.values()} == {(4, 4.0)}
        assert_same_updates(as_others_read, lora)
        found = open_adapter(path, [SMALL["sd15"]])
        assert {name: (one.rank, one.alpha) for name, one in found.adapter.updates.items()} == {
            name: (one.rank, one.alpha) for name, one in own.items()
        }
        assert_same_updates(found, lora)
        if alphas == (2.0, 8.0):
            assert_same_factors(found, lora)

    def test_where_alpha_is_the_rank_no_bit_changes_and_nothing_stands_beside(self, tmp_path):
        path, lora = write_lora_file(LoraFormat.DIFFUSERS, tmp_path / "lora", ranks=(4,), alphas=(4.0,))
        file = open_tensor_file(path)
        assert "dreambooth_ms_lora" not in file.metadata
        layer, own = next(iter(lora.adapter.updates.items()))
        assert file.tensors[f"{layer}.lora.up.weight"].read().tobytes() == own.up.tobytes()

    @pytest.mark.parametrize(
        "said", ['{"unet.r": 9, "unet.lora_alpha": 2}', "{", '{"unet.r": 2, "unet.lora_alpha": 0}']
    )
    def test_a_trained_alpha_that_does_not_fit_the_factors_changes_nothing(self, tmp_path, said):
        path, lora = write_lora_file(LoraFormat.DIFFUSERS, tmp_path / "lora", ranks=(4,), alphas=(8.0,))
        file = open_tensor_file(path)
        write_safetensors(tmp_path / "x.safetensors", file.tensors, {**file.metadata, "dreambooth_ms_lora": said})
        found = open_adapter(tmp_path / "x.safetensors", [SMALL["sd15"]])
        assert_same_updates(found, lora)
        assert {one.alpha for one in found.adapter.updates.values()} == {4.0}

    def test_a_scale_that_the_type_cannot_hold_is_refused_and_nothing_is_written(self, tmp_path, bases, capsys):
        path, _ = write_lora_file(LoraFormat.KOHYA, tmp_path / "lora", alphas=(1e6,))
        target = tmp_path / "out.safetensors"
        assert convert(path, target, LoraFormat.DIFFUSERS, bases["sd15"], "--dtype", "fp16") == 2
        assert "holds a number that is too large for F16; choose a wider type" in capsys.readouterr().err
        assert [one.name for one in tmp_path.iterdir()] == [path.name]

    def test_ranks_that_are_filled_up_are_told(self, tmp_path, bases, capsys):
        path, _ = write_lora_file(LoraFormat.KOHYA, tmp_path / "lora")
        assert convert(path, tmp_path / "out.safetensors", LoraFormat.DIFFUSERS, bases["sd15"]) == 0
        assert "unet: ranks 2 to 4 are filled up to 4; older readers take one for all." in capsys.readouterr().err


class TestTargetModules:
    """The shortest ends of names that fit: full names differ between versions of transformers."""

    @pytest.mark.parametrize(
        ("choose", "unet", "text"),
        [
            (attention_and_text, ["to_k", "to_out.0", "to_q", "to_v"], ["k_proj", "out_proj", "q_proj", "v_proj"]),
            (
                lambda layer: layer.endswith((".attn2.to_q", ".0.self_attn.q_proj")),
                ["attn2.to_q"],
                ["layers.0.self_attn.q_proj"],
            ),
            (lambda layer: layer.endswith((".ff.net.2", ".proj", "fc1")), ["net.2", "proj"], ["fc1"]),
        ],
        ids=["attention", "some of it", "feed-forward"],
    )
    def test_they_are_short_and_exact(self, tmp_path, choose, unet, text):
        path, _ = write_lora_file(LoraFormat.PEFT, tmp_path / "lora", choose=choose)
        for part, ends in (("unet", unet), ("text_encoder", text)):
            config = json.loads((path / part / "adapter_config.json").read_text())
            assert config["target_modules"] == ends

    def test_ranks_and_alphas_are_found_by_one_key(self, tmp_path):
        path, lora = write_lora_file(LoraFormat.PEFT, tmp_path / "lora", ranks=(2, 4), alphas=(1.0, 3.0))
        for part, layers in lora.adapter.parts.items():
            config = json.loads((path / part / "adapter_config.json").read_text())
            assert config["rank_pattern"].keys() == config["alpha_pattern"].keys()
            assert not any(key.startswith("text_model.") for key in config["rank_pattern"])
            for layer, own in layers.items():
                (key,) = [key for key in config["rank_pattern"] if f".{layer}".endswith(f".{key}")] or [None]
                expected = (
                    config["rank_pattern"].get(key, config["r"]),
                    config["alpha_pattern"].get(key, config["lora_alpha"]),
                )
                assert (own.rank, own.alpha) == expected


def test_layers_that_kohya_never_adapts_are_told(tmp_path, bases, capsys):
    ends = (".conv_in", ".time_embedding.linear_1", ".text_projection", ".to_q", ".conv1")
    path, _ = write_lora_file(LoraFormat.DIFFUSERS, tmp_path / "lora", "sdxl", choose=lambda name: name.endswith(ends))
    assert convert(path, tmp_path / "out.safetensors", LoraFormat.KOHYA, bases["sdxl"]) == 0
    said = capsys.readouterr().err
    assert "3 of " in said
    assert "layers are none that kohya's scripts adapt, and they leave them out (unet.conv_in, " in said
    path, _ = write_lora_file(LoraFormat.DIFFUSERS, tmp_path / "plain", "sdxl")
    assert convert(path, tmp_path / "more.safetensors", LoraFormat.KOHYA, bases["sdxl"]) == 0
    assert "kohya's scripts" not in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--use_ema"], ["--prediction_type", "epsilon"], ["--variant", "fp16"]])
def test_a_flag_of_models_is_not_passed_over(tmp_path, bases, capsys, flags):
    path, _ = write_lora_file(LoraFormat.KOHYA, tmp_path / "lora")
    assert convert(path, tmp_path / "out", LoraFormat.PEFT, bases["sd15"], *flags) == 2
    assert f"this is a LoRA; leave out {flags[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("form", [LoraFormat.DIFFUSERS, LoraFormat.PEFT, LoraFormat.KOHYA], ids=lambda form: form.value)
@pytest.mark.parametrize("family", FAMILIES)
def test_to_mindone_and_back_the_update_is_the_same(tmp_path, bases, family, form, capsys):
    path, lora = write_lora_file(form, tmp_path / "lora", family, choose=attention, dtype=DTYPES[family])
    assert convert(path, tmp_path / "lora.ckpt", LoraFormat.MINDONE, bases[family]) == 0
    back = tmp_path / f"back{FILES.get(form, '.safetensors')}"
    assert convert(tmp_path / "lora.ckpt", back, form, bases[family]) == 0
    said = capsys.readouterr().err
    assert ("alpha is the rank" if family != "sdxl" else ": it is taken as the rank") in said
    assert_same_updates(open_adapter(back, [SMALL[family]]), lora)


def test_the_fused_projections_of_mindones_text_tower_get_one_common_factor(tmp_path, bases):
    path, lora = write_lora_file(LoraFormat.KOHYA, tmp_path / "lora", "sd15")
    assert convert(path, tmp_path / "lora.ckpt", LoraFormat.MINDONE, bases["sd15"]) == 0
    assert_same_updates(open_adapter(tmp_path / "lora.ckpt", [SMALL["sd15"]]), lora)


def test_layers_that_a_format_has_no_place_for_are_named_and_nothing_is_written(tmp_path, bases, capsys):
    path, _ = write_lora_file(LoraFormat.KOHYA, tmp_path / "lora", "sdxl")
    assert convert(path, tmp_path / "out.ckpt", LoraFormat.MINDONE, bases["sdxl"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path}: a LoRA in the naming of mindone has no place for 96 of " in line
    assert not (tmp_path / "out.ckpt").exists()


@pytest.mark.parametrize(("name", "dtype"), [("fp16", DType.F16), ("bf16", DType.BF16)])
def test_numbers_are_rounded_to_the_type_that_is_asked_for(tmp_path, bases, name, dtype):
    path, _ = write_lora_file(LoraFormat.KOHYA, tmp_path / "lora")
    assert convert(path, tmp_path / "out.safetensors", LoraFormat.DIFFUSERS, bases["sd15"], "--dtype", name) == 0
    assert {tensor.dtype for tensor in open_tensor_file(tmp_path / "out.safetensors").tensors.values()} == {dtype}


def test_published_sizes_need_no_base(tmp_path):
    lora = random_lora(PUBLISHED["sdxl"], tmp_path, choose=lambda layer: layer.startswith("unet.mid_block."))
    write_lora_as(lora, tmp_path / "lora.safetensors", LoraFormat.KOHYA)
    assert main(["convert", str(tmp_path / "lora.safetensors"), str(tmp_path / "peft"), "--format", "peft"]) == 0
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert (config["peft_type"], config["auto_mapping"]["base_model_class"]) == ("LORA", "UNet2DConditionModel")


class TestTargets:
    @pytest.mark.parametrize(
        ("target", "said"),
        [
            ("out", "may be peft or diffusers; say which with --format (diffusers, diffusers_peft, "),
            ("out.safetensors", "may be kohya or diffusers; say which with --format (diffusers, diffusers_peft, "),
            ("out.bin", "PyTorch's pickles can run code and are not written; end it in .safetensors"),
        ],
    )
    def test_a_name_that_leaves_the_format_open_is_not_guessed(self, tmp_path, bases, capsys, target, said):
        path, _ = write_lora_file(LoraFormat.KOHYA, tmp_path / "lora")
        assert main(["convert", str(path), str(tmp_path / target), "--base", str(bases["sd15"])]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / target).exists()

    @pytest.mark.parametrize("name", ["out.ckpt", "pytorch_lora_weights.safetensors"])
    def test_a_name_that_says_it_is_enough(self, tmp_path, bases, name):
        path, _ = write_lora_file(LoraFormat.KOHYA, tmp_path / "lora", choose=attention)
        assert main(["convert", str(path), str(tmp_path / name), "--base", str(bases["sd15"])]) == 0

    @pytest.mark.parametrize(
        ("form", "target"), [("kohya", "out.ckpt"), ("peft", "out.safetensors"), ("mindone", "out.safetensors")]
    )
    def test_a_format_that_is_kept_in_another_kind_of_file_is_refused(self, tmp_path, bases, capsys, form, target):
        path, _ = write_lora_file(LoraFormat.KOHYA, tmp_path / "lora")
        flags = ["--format", form, "--base", str(bases["sd15"])]
        assert main(["convert", str(path), str(tmp_path / target), *flags]) == 2
        assert f"--format {form} is written to a " in capsys.readouterr().err


class TestSources:
    @pytest.mark.parametrize("form", [LoraFormat.KOHYA, LoraFormat.DIFFUSERS, LoraFormat.MINDONE], ids=NAMES.get)
    def test_a_lora_for_another_family_says_for_which(self, tmp_path, bases, capsys, form):
        path = tmp_path / f"lora{FILES.get(form, '.safetensors')}"
        lora = random_lora(PUBLISHED["sdxl"], path, choose=lambda layer: ".mid_block." in layer and attention(layer))
        write_lora_as(lora, path, form)
        assert main(["inspect", str(path), "--base", str(bases["sd15"])]) == 2
        assert f"{path}: this is a LoRA for SDXL base; expected one for SD 1.x" in capsys.readouterr().err

    def test_other_sizes_of_the_same_family_are_told_by_their_shapes(self, tmp_path, capsys):
        path, _ = write_lora_file(LoraFormat.KOHYA, tmp_path / "lora", "sdxl")
        assert main(["inspect", str(path)]) == 2
        assert "does not fit a LoRA of SDXL base in the naming of kohya: " in capsys.readouterr().err

    def test_rank_stabilised_scales_and_patterns_of_peft_are_read(self, tmp_path):
        path, _ = write_lora_file(LoraFormat.PEFT, tmp_path / "lora", choose=attention, ranks=(4,), alphas=(2.0,))
        config = json.loads((path / "adapter_config.json").read_text())
        config |= {"use_rslora": True, "alpha_pattern": {"attn2.to_k": 8}}
        (path / "adapter_config.json").write_text(json.dumps(config))
        found = open_adapter(path, [SMALL["sd15"]]).adapter.updates
        # alpha / sqrt(4) is twice alpha / 4.
        assert {own.alpha for layer, own in found.items() if layer.endswith("attn2.to_k")} == {16.0}
        assert {own.alpha for layer, own in found.items() if not layer.endswith("attn2.to_k")} == {4.0}

    def test_a_pickled_adapter_of_peft_is_read(self, tmp_path):
        import torch
        from safetensors.torch import load_file

        path, lora = write_lora_file(LoraFormat.PEFT, tmp_path / "lora", choose=attention)
        torch.save(load_file(path / "adapter_model.safetensors"), path / "adapter_model.bin")
        (path / "adapter_model.safetensors").unlink()
        assert_same_factors(open_adapter(path, [SMALL["sd15"]]), lora)

    @pytest.mark.parametrize("number", [np.nan, np.inf])
    def test_an_alpha_that_is_no_number_is_refused(self, tmp_path, number):
        path, _ = write_lora_file(LoraFormat.KOHYA, tmp_path / "lora")
        tensors = dict(open_tensor_file(path).tensors)
        name = next(name for name in tensors if name.endswith(".alpha"))
        tensors[name] = type(tensors[name]).of(np.float32(number))
        write_safetensors(tmp_path / "bent.safetensors", tensors)
        with pytest.raises(WeightError, match="NaN or infinity in 1 of its tensors"):
            open_adapter(tmp_path / "bent.safetensors", [SMALL["sd15"]])

    def test_half_a_layer_is_missing_the_other_half(self, tmp_path, bases, capsys):
        path, _ = write_lora_file(LoraFormat.KOHYA, tmp_path / "lora")
        tensors = dict(open_tensor_file(path).tensors)
        del tensors[next(name for name in tensors if name.endswith("lora_up.weight"))]
        write_safetensors(tmp_path / "bent.safetensors", tensors)
        target = tmp_path / "out.safetensors"
        assert convert(tmp_path / "bent.safetensors", target, LoraFormat.DIFFUSERS, bases["sd15"]) == 2
        assert "1 missing (unet 1: " in capsys.readouterr().err

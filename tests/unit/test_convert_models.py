"""Models of every family go from every format to every other and come back bit by bit."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from dreambooth_ms import atomic
from dreambooth_ms.cli.main import main
from dreambooth_ms.conversion import model_format_of
from dreambooth_ms.diffusion import NoiseSchedule
from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.open import open_tensor_file
from dreambooth_ms.formats.files.safetensors_file import write_safetensors
from dreambooth_ms.formats.files.stored import StoredTensor
from dreambooth_ms.formats.model_config import NETWORK_READERS, read_scheduler_config
from dreambooth_ms.formats.naming.formats import Format, naming_of
from dreambooth_ms.formats.naming.recognise import with_channels
from dreambooth_ms.models.specs import PLAYGROUND_25_VAE
from dreambooth_ms.weights.model_writing import plan_model
from dreambooth_ms.weights.opened_model import open_model
from tests.small_specs import SMALL
from tests.whole_models import (
    RUNNING,
    RUNNING_SD2,
    RUNNING_SDXL,
    SUFFIXES,
    random_model,
    values_of,
    write_in_shards,
    write_model,
)

# From each format to each, itself included, once.
DIFFUSERS, STABILITY, MINDONE = Format
WAY = [DIFFUSERS, DIFFUSERS, STABILITY, STABILITY, MINDONE, MINDONE, DIFFUSERS, MINDONE, STABILITY, DIFFUSERS]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("sd15", DType.F32),
        ("sd15", DType.F16),
        ("sd15", DType.BF16),
        ("sd21", DType.F16),
        ("sdxl", DType.BF16),
        ("refiner", DType.F32),
    ],
    ids=lambda value: value if isinstance(value, str) else value.value,
)
def test_the_way_through_every_format_to_every_other_changes_no_bit(tmp_path, family, dtype):
    path, model = write_model(WAY[0], tmp_path / "0", family, dtype=dtype)
    for step, form in enumerate(WAY[1:], 1):
        source, path = path, tmp_path / f"{step}{SUFFIXES[form]}"
        assert main(["convert", str(source), str(path)]) == 0
        found = open_model(path)
        found.check()
        assert (found.form, found.spec.family, found.missing_parts) == (form, model.spec.family, [])
    assert set(found.dtypes) == {dtype}
    assert values_of(found.tensors) == values_of(model.tensors)


@pytest.mark.parametrize("form", Format, ids=lambda form: form.value)
def test_numbers_are_rounded_to_the_type_that_is_asked_for(tmp_path, form):
    path, model = write_model(form, tmp_path / "model")
    for name, dtype in (("fp16", DType.F16), ("bf16", DType.BF16)):
        out = tmp_path / f"{name}{SUFFIXES[form]}"
        assert main(["convert", str(path), str(out), "--dtype", name]) == 0
        expected = {public: own.cast_to(dtype) for public, own in model.tensors.items()}
        found = open_model(out).tensors
        assert values_of({public: found[public] for public in expected}) == values_of(expected)


def test_a_large_folder_is_sharded_and_read_again(tmp_path):
    model = random_model(SMALL["sd15"], tmp_path)
    write_in_shards(model, tmp_path / "out", 100_000)
    assert len(list((tmp_path / "out/unet").glob("*-of-*.safetensors"))) > 1
    assert values_of(open_model(tmp_path / "out").tensors) == values_of(model.tensors)


def test_the_only_variant_is_found_and_one_of_several_is_asked_for(tmp_path):
    path, model = write_model(Format.DIFFUSERS, tmp_path / "model", dtype=DType.F16)
    for file in path.rglob("*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    assert values_of(open_model(path).tensors) == values_of(model.tensors)
    (path / "vae/diffusion_pytorch_model.ema.safetensors").write_bytes(b"")
    with pytest.raises(WeightError, match="vae is there in the variants ema, fp16; name one with --variant"):
        open_model(path)
    assert open_model(path, "fp16").dtypes.keys() == {DType.F16}


STATISTICS = {
    "edm_mean": StoredTensor.of(np.array(PLAYGROUND_25_VAE.latents_mean, np.float32).reshape(1, 4, 1, 1)),
    "edm_std": StoredTensor.of(np.array(PLAYGROUND_25_VAE.latents_std, np.float32).reshape(1, 4, 1, 1)),
}
"""Of the latents, as Playground v2.5's single file holds them."""


def single_file(tmp_path, family="sd15", more=None, without=(), name="model.safetensors"):
    """A single file in Stability's naming, with other tensors besides or some left out."""
    planned = plan_model(random_model(SMALL[family], tmp_path), Format.STABILITY)
    tensors = {key: own for key, own in planned.tensors.items() if not key.startswith(tuple(without) or "\0")}
    write_safetensors(tmp_path / name, tensors | (more or {}))
    return tmp_path / name, planned


class TestSingleFiles:
    def test_without_an_autoencoder(self, tmp_path, capsys):
        path, _ = single_file(tmp_path, without=["first_stage_model."])
        assert main(["convert", str(path), str(tmp_path / "out")]) == 0
        assert "It has no vae, and neither has the target." in capsys.readouterr().err
        found = open_model(tmp_path / "out")
        assert (found.parts, found.missing_parts) == (("unet", "text_encoder"), ["vae"])
        assert json.loads((tmp_path / "out/model_index.json").read_text())["vae"] == [None, None]

    def test_moving_averages_are_left_or_taken(self, tmp_path, capsys):
        naming = naming_of(Format.STABILITY, SMALL["sd15"])
        averages = {slot.name: name for name, slot in naming.averages.items()}
        more = {
            stored: StoredTensor.of(np.full(naming.shapes[name], 7, np.float32)) for stored, name in averages.items()
        }
        more |= {"model_ema.decay": StoredTensor.of(np.float32(0.9999)), "betas": StoredTensor.of(np.zeros(1000))}
        path, planned = single_file(tmp_path, more=more)
        assert main(["convert", str(path), str(tmp_path / "plain")]) == 0
        assert f"{len(averages)} moving averages (EMA) not written" in capsys.readouterr().err
        assert values_of(open_model(tmp_path / "plain").tensors) == values_of(planned.model.tensors)
        assert main(["convert", str(path), str(tmp_path / "ema"), "--use_ema"]) == 0
        found = open_model(tmp_path / "ema").tensors
        said = capsys.readouterr().err
        assert f"Moving averages (EMA) are taken in place of the weights: {len(averages)}." in said
        assert "are not written" not in said
        assert all((found[name].read() == 7).all() for name in averages.values())
        assert values_of({n: t for n, t in found.items() if n.startswith("vae.")}) == values_of(
            {n: t for n, t in planned.model.tensors.items() if n.startswith("vae.")}
        )

    def test_weights_without_an_average_stay(self, tmp_path, capsys):
        averages = {slot.name: name for name, slot in naming_of(Format.STABILITY, SMALL["sd15"]).averages.items()}
        stored, name = next(iter(averages.items()))
        shape = naming_of(Format.STABILITY, SMALL["sd15"]).shapes[name]
        path, planned = single_file(tmp_path, more={stored: StoredTensor.of(np.full(shape, 7, np.float32))})
        assert main(["convert", str(path), str(tmp_path / "ema"), "--use_ema"]) == 0
        assert "Moving averages (EMA) are taken in place of the weights: 1." in capsys.readouterr().err
        found = open_model(tmp_path / "ema").tensors
        assert (found[name].read() == 7).all()
        others = {other: own for other, own in planned.model.tensors.items() if other != name}
        assert values_of({other: found[other] for other in others}) == values_of(others)

    def test_averages_that_are_not_there_are_not_taken(self, tmp_path, capsys):
        path, _ = single_file(tmp_path)
        assert main(["convert", str(path), str(tmp_path / "out"), "--use_ema"]) == 2
        assert "holds no moving averages" in capsys.readouterr().err

    def test_a_folder_keeps_no_averages(self, tmp_path, capsys):
        path, _ = write_model(Format.DIFFUSERS, tmp_path / "model")
        assert main(["convert", str(path), str(tmp_path / "out.ckpt"), "--use_ema"]) == 2
        assert "a folder keeps no moving averages (EMA) beside its weights; leave out" in capsys.readouterr().err

    @pytest.mark.parametrize("form", Format, ids=lambda form: form.value)
    @pytest.mark.parametrize(
        ("value", "flags", "said"),
        [
            (np.nan, [], "holds NaN or infinity; download it again"),
            (-np.inf, ["--dtype", "bf16"], "holds NaN or infinity; download it again"),
            (1e5, ["--dtype", "fp16"], "holds a number that is too large for F16; choose a wider type"),
        ],
    )
    def test_what_is_not_finite_is_named_and_nothing_is_written(self, tmp_path, capsys, form, value, flags, said):
        path, _ = single_file(tmp_path)
        tensors, name = dict(open_tensor_file(path).tensors), "model.diffusion_model.out.2.bias"
        tensors[name] = StoredTensor.of(np.array([0, 0, value, 0], np.float32))
        write_safetensors(tmp_path / "bent.safetensors", tensors)
        before = sorted(tmp_path.iterdir())
        target = tmp_path / f"out{SUFFIXES[form]}"
        assert main(["convert", str(tmp_path / "bent.safetensors"), str(target), *flags]) == 2
        assert f"error: {tmp_path}/bent.safetensors: {name}: {said}" in capsys.readouterr().err
        assert sorted(tmp_path.iterdir()) == before

    @pytest.mark.parametrize(
        ("file", "change", "said"),
        [
            ("unet", {"act_fn": "gelu"}, "act_fn.*gelu"),
            ("unet", {"cross_attention_dim": 5}, "does not fit its own configurations: .* of another shape"),
            ("text_encoder", {"num_hidden_layers": 1}, "does not fit its own configurations: .* unexpected"),
            ("vae", {"layers_per_block": 3}, "does not fit its own configurations: .* missing"),
        ],
    )
    def test_a_folder_is_read_as_strictly_as_by_those_who_compute_with_it(self, tmp_path, capsys, file, change, said):
        path, _ = write_model(Format.DIFFUSERS, tmp_path / "model")
        config = path / file / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
        assert main(["convert", str(path), str(tmp_path / "out.safetensors")]) == 2
        assert re.search(said, capsys.readouterr().err)
        assert main(["inspect", str(path)]) == 0
        assert re.search(f"does not fit: .*{said}", capsys.readouterr().out)

    @pytest.mark.parametrize("flags", [["--alpha", "2"], ["--base", "x"]])
    def test_a_flag_of_loras_is_not_passed_over(self, tmp_path, capsys, flags):
        path, _ = single_file(tmp_path)
        assert main(["convert", str(path), str(tmp_path / "out"), *flags]) == 2
        assert f"this is a model; leave out {flags[0]}" in capsys.readouterr().err

    def test_everything_that_does_not_fit_is_listed_with_counts_and_nothing_is_written(self, tmp_path, capsys):
        path, _ = single_file(tmp_path)
        tensors = dict(open_tensor_file(path).tensors)
        block = "model.diffusion_model.input_blocks.1.0.out_layers"
        del tensors[f"{block}.0.weight"], tensors[f"{block}.0.bias"]
        tensors[f"{block}.3.bias"] = StoredTensor.of(np.zeros(3, np.float32))
        tensors["model.diffusion_model.surplus"] = StoredTensor.of(np.zeros(3, np.float32))
        twice = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
        tensors[twice.replace("text_model.", "")] = tensors[twice]
        write_safetensors(tmp_path / "bent.safetensors", tensors)
        assert main(["convert", str(tmp_path / "bent.safetensors"), str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "does not fit a model of SD 1.x in the naming of stability" in line
        for part in (
            "2 missing (unet 2: ",
            "1 unexpected (model.diffusion_model.surplus)",
            "1 of another shape (unet 1",
        ):
            assert part in line
        assert "1 there more than once (text_encoder 1: " in line
        assert not (tmp_path / "out").exists()

    def test_what_it_predicts_comes_back(self, tmp_path):
        """By the metadata of a single file; a folder has a scheduler."""
        model = random_model(SMALL["sd21"], tmp_path, prediction_type="epsilon")
        plan_model(model, Format.STABILITY).write(tmp_path / "model.safetensors")
        assert main(["convert", str(tmp_path / "model.safetensors"), str(tmp_path / "out")]) == 0
        assert open_model(tmp_path / "out").prediction_type == "epsilon"

    def test_velocity_of_sdxl_is_said_where_other_tools_look_for_it(self, tmp_path):
        model = random_model(SMALL["sdxl"], tmp_path, prediction_type="v_prediction")
        plan_model(model, Format.STABILITY).write(tmp_path / "model.safetensors")
        tensors = open_tensor_file(tmp_path / "model.safetensors").tensors
        assert tensors["v_pred"].shape == (0,)
        write_safetensors(tmp_path / "bare.safetensors", tensors)
        assert open_model(tmp_path / "bare.safetensors").prediction_type == "v_prediction"

    def test_latents_of_playground_keep_their_mean_and_deviation_in_folders_and_files(self, tmp_path):
        path, _ = single_file(tmp_path, "sdxl", STATISTICS)
        assert main(["convert", str(path), str(tmp_path / "folder")]) == 0
        vae = json.loads((tmp_path / "folder/vae/config.json").read_text())
        assert tuple(vae["latents_mean"]) == PLAYGROUND_25_VAE.latents_mean
        assert tuple(vae["latents_std"]) == PLAYGROUND_25_VAE.latents_std
        assert vae["scaling_factor"] == PLAYGROUND_25_VAE.scaling_factor
        scheduler = json.loads((tmp_path / "folder/scheduler/scheduler_config.json").read_text())
        assert scheduler["_class_name"] == "EDMDPMSolverMultistepScheduler"
        assert main(["convert", str(tmp_path / "folder"), str(tmp_path / "again.safetensors")]) == 0
        again = open_tensor_file(tmp_path / "again.safetensors").tensors
        assert values_of({name: again[name] for name in STATISTICS}) == values_of(STATISTICS)

    def test_a_mindspore_checkpoint_has_no_place_for_them(self, tmp_path, capsys):
        path, _ = single_file(tmp_path, "sdxl", STATISTICS)
        assert main(["convert", str(path), str(tmp_path / "out.ckpt")]) == 0
        said = r"A MindSpore checkpoint has no place for .*vae latents_mean, vae latents_std.*: keep the source"
        assert re.search(said, capsys.readouterr().err)

    @pytest.mark.parametrize(
        ("values", "said"),
        [(np.zeros(3), "expected 4 numbers"), (np.array([1, 2, np.nan, 4]), "expected a list, each a number")],
        ids=["too few", "NaN"],
    )
    def test_statistics_that_are_none_are_refused(self, tmp_path, capsys, values, said):
        more = STATISTICS | {"edm_mean": StoredTensor.of(values.astype(np.float32))}
        path, _ = single_file(tmp_path, "sdxl", more)
        assert main(["convert", str(path), str(tmp_path / "out")]) == 2
        assert f"latents_mean: {said}" in capsys.readouterr().err

    @pytest.mark.parametrize(("flags", "kind"), [([], "v_prediction"), (["--prediction_type", "epsilon"], "epsilon")])
    def test_of_sd_2_it_is_assumed_or_told(self, tmp_path, capsys, flags, kind):
        path, _ = single_file(tmp_path, "sd21")
        assert main(["convert", str(path), str(tmp_path / "out"), *flags]) == 0
        assert ("--prediction_type says otherwise" in capsys.readouterr().err) is not bool(flags)
        scheduler = json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())
        assert scheduler["prediction_type"] == kind

    @pytest.mark.parametrize(("channels", "kind"), [(4, "v_prediction"), (5, "epsilon"), (9, "epsilon")])
    def test_of_sd_2_for_depth_and_inpainting_noise_is_assumed(self, tmp_path, channels, kind):
        model = random_model(with_channels(SMALL["sd21"], channels, 4), tmp_path, prediction_type=None)
        assert model.assumed_prediction == kind


MARKS = {name: StoredTensor.of(np.zeros(0, np.float32)) for name in ("v_pred", "ztsnr")}
EMBEDDED = Path("checkpoints/tiny-shapes")
SCHEDULER = "scheduler/scheduler_config.json"
OTHER_NOISE = {
    "trained_betas": [0.001 + 1e-5 * number for number in range(1000)],
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": True,
}


class TestWhatAFileDoesNotSay:
    def test_marks_of_velocity_and_zero_terminal_snr_are_read_and_written(self, tmp_path):
        path, _ = single_file(tmp_path, "sdxl", MARKS)
        assert main(["convert", str(path), str(tmp_path / "folder")]) == 0
        scheduler = json.loads((tmp_path / "folder" / SCHEDULER).read_text())
        expected = {
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
            "clip_sample": False,
        }
        assert {key: scheduler[key] for key in expected} == expected
        assert NoiseSchedule.from_spec(read_scheduler_config(scheduler)).alphas_cumprod[-1] == 0
        assert main(["convert", str(tmp_path / "folder"), str(tmp_path / "again.safetensors")]) == 0
        tensors = open_tensor_file(tmp_path / "again.safetensors").tensors
        assert [name for name in MARKS if name in tensors] == list(MARKS)
        assert main(["convert", str(path), str(tmp_path / "epsilon"), "--prediction_type", "epsilon"]) == 0
        assert json.loads((tmp_path / "epsilon" / SCHEDULER).read_text())["prediction_type"] == "epsilon"

    @pytest.mark.parametrize(
        ("marks", "metadata", "kind"), [(MARKS, "epsilon", "v_prediction"), ({}, "v", "v_prediction")]
    )
    def test_a_mark_counts_more_than_metadata(self, tmp_path, marks, metadata, kind):
        path, _ = single_file(tmp_path, "sdxl", marks)
        metadata = {"modelspec.prediction_type": metadata}
        write_safetensors(tmp_path / "told.safetensors", open_tensor_file(path).tensors, metadata)
        assert open_model(tmp_path / "told.safetensors").prediction_type == kind

    def test_what_a_folder_says_of_its_noise_survives_a_file(self, tmp_path, capsys):
        path, _ = write_model(Format.DIFFUSERS, tmp_path / "model", "sdxl", prediction_type="v_prediction")
        scheduler = json.loads((path / SCHEDULER).read_text()) | OTHER_NOISE
        (path / SCHEDULER).write_text(json.dumps(scheduler))
        assert main(["convert", str(path), str(tmp_path / "one.safetensors")]) == 0
        said = capsys.readouterr().err
        assert "A single file has no place for" in said
        assert "scheduler trained_betas" in said
        assert "scheduler rescale_betas_zero_snr" not in said, "a mark says it"
        assert main(["convert", str(tmp_path / "one.safetensors"), str(tmp_path / "again")]) == 0
        assert json.loads((tmp_path / "again" / SCHEDULER).read_text()) == scheduler
        assert main(["convert", str(path), str(tmp_path / "one.ckpt")]) == 0
        said = r"no place for .*scheduler trained_betas, scheduler rescale_betas_zero_snr.*: keep the source"
        assert re.search(said, capsys.readouterr().err)

    def test_the_embedded_base_is_the_same_after_a_file(self, tmp_path, capsys):
        """Its heads, norm groups, size and scale of latents are not those of Stable Diffusion 1."""
        assert main(["convert", str(EMBEDDED), str(tmp_path / "one.safetensors")]) == 0
        said = capsys.readouterr().err
        for name in ("unet num_heads", "unet norm_num_groups", "unet sample_size", "vae scaling_factor"):
            assert name in said
        assert "Its words are not CLIP's, and a file has no place for its tokenizer" in said
        assert said.index("no place for") < said.index("wrote ")
        assert open_model(tmp_path / "one.safetensors").spec.vae.scaling_factor == 1.0
        assert main(["convert", str(tmp_path / "one.safetensors"), str(tmp_path / "again")]) == 0
        for part, read in NETWORK_READERS.items():
            name = f"{part}/config.json"
            if (EMBEDDED / name).exists():
                own, again = (read(json.loads((base / name).read_text())) for base in (EMBEDDED, tmp_path / "again"))
                assert own == again

    def test_a_model_of_published_kind_has_nothing_to_keep(self, tmp_path, capsys):
        for number, model in enumerate((RUNNING, RUNNING_SD2, RUNNING_SDXL)):
            planned = plan_model(random_model(model, tmp_path), Format.DIFFUSERS)
            planned.write(tmp_path / f"{number}")
            for suffix in (".safetensors", ".ckpt"):
                assert main(["convert", str(tmp_path / f"{number}"), str(tmp_path / f"{number}{suffix}")]) == 0
            assert "has no place for" not in capsys.readouterr().err
            assert "dreambooth_ms.configurations" not in open_tensor_file(tmp_path / f"{number}.safetensors").metadata

    @pytest.mark.parametrize(
        "kept",
        [
            "{",
            "[]",
            '{"unet/config.json": 3}',
            '{"../config.json": {}}',
            '{"vae/config.json": {"scaling_factor": "1"}}',
        ],
    )
    def test_damaged_metadata_are_told(self, tmp_path, capsys, kept):
        path, _ = single_file(tmp_path)
        metadata = {"dreambooth_ms.configurations": kept}
        write_safetensors(tmp_path / "told.safetensors", open_tensor_file(path).tensors, metadata)
        assert main(["convert", str(tmp_path / "told.safetensors"), str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "told.safetensors" in line
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        "scheduler", [{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, {"foo": 1}]
    )
    def test_a_scheduler_that_nobody_knows_survives_too(self, tmp_path, capsys, scheduler):
        path, _ = write_model(Format.DIFFUSERS, tmp_path / "model")
        (path / SCHEDULER).write_text(json.dumps(scheduler))
        assert main(["convert", str(path), str(tmp_path / "one.safetensors")]) == 0
        assert "scheduler config.json" in capsys.readouterr().err
        assert main(["convert", str(tmp_path / "one.safetensors"), str(tmp_path / "again")]) == 0
        assert json.loads((tmp_path / "again" / SCHEDULER).read_text()) == scheduler

    def test_what_it_predicts_can_be_told_of_a_folder(self, tmp_path):
        path, _ = write_model(Format.DIFFUSERS, tmp_path / "model")
        assert main(["convert", str(path), str(tmp_path / "out"), "--prediction_type", "v_prediction"]) == 0
        assert json.loads((tmp_path / "out" / SCHEDULER).read_text())["prediction_type"] == "v_prediction"

    def test_a_folder_without_a_scheduler_is_converted(self, tmp_path):
        path, _ = write_model(Format.DIFFUSERS, tmp_path / "model")
        shutil.rmtree(path / "scheduler")
        assert main(["convert", str(path), str(tmp_path / "one.safetensors")]) == 0
        assert main(["convert", str(path), str(tmp_path / "out")]) == 0
        assert not (tmp_path / "out" / "scheduler").exists()


class TestTargets:
    @pytest.mark.parametrize(
        ("target", "flags", "said"),
        [
            ("out.bin", [], "PyTorch's pickles can run code and are not written"),
            ("out.gguf", [], ".gguf is no kind of file that is written; end it in .safetensors or .ckpt"),
            (
                "out.ckpt",
                ["--format", "stability"],
                "--format stability is written to a file that ends in .safetensors",
            ),
            ("out", ["--format", "kohya"], "--format kohya: for LoRAs only; for a model choose one of diffusers"),
            ("out.safetensors", ["--dtype", "fp8"], "--dtype: expected one of fp32, fp16, bf16, or None, got 'fp8'"),
            ("model.safetensors", [], "is there already; remove it, or choose another name"),
            ("model.safetensors/out.ckpt", [], "Not a directory"),
        ],
    )
    def test_a_target_that_cannot_be(self, tmp_path, capsys, target, flags, said):
        path, _ = single_file(tmp_path)
        before = path.read_bytes()
        assert main(["convert", str(path), str(tmp_path / target), *flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
        assert [one.name for one in tmp_path.iterdir()] == ["model.safetensors"]
        assert path.read_bytes() == before

    @pytest.mark.parametrize("name", ["folder", "sd-v1.5", "new/folder"])
    def test_a_name_without_an_extension_is_a_folder(self, tmp_path, name):
        assert model_format_of(tmp_path / name, None) is Format.DIFFUSERS

    @pytest.mark.parametrize("form", Format, ids=lambda form: form.value)
    def test_a_disk_that_lacks_room_is_told_before_a_byte_is_written(self, tmp_path, monkeypatch, capsys, form):
        path, planned = single_file(tmp_path)
        free = type("usage", (), {"free": planned.byte_count - 1})
        monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: free)
        assert main(["convert", str(path), str(tmp_path / f"out{SUFFIXES[form]}")]) == 2
        assert "No space left on device" in capsys.readouterr().err
        assert [one.name for one in tmp_path.iterdir()] == ["model.safetensors"]

    @pytest.mark.parametrize("form", Format, ids=lambda form: form.value)
    def test_a_source_that_breaks_off_leaves_nothing_behind(self, tmp_path, monkeypatch, capsys, form):
        path, planned = single_file(tmp_path)
        write = StoredTensor.write_to

        def breaks(tensor, file):
            if tensor.shape == planned.model.tensors["vae.decoder.conv_out.weight"].shape:
                raise WeightError("model.safetensors: changed while it was being read; try again")
            write(tensor, file)

        monkeypatch.setattr(StoredTensor, "write_to", breaks)
        assert main(["convert", str(path), str(tmp_path / f"out{SUFFIXES[form]}")]) == 2
        assert "changed while it was being read" in capsys.readouterr().err
        assert [one.name for one in tmp_path.iterdir()] == ["model.safetensors"]

    def test_the_folder_of_a_folder_has_all_that_the_first_has(self, tmp_path):
        path, _ = write_model(Format.DIFFUSERS, tmp_path / "model")
        (path / "tokenizer").mkdir()
        (path / "tokenizer/vocab.json").write_text('{"own": 0}')
        index = json.loads((path / "model_index.json").read_text())
        own = json.loads((path / "unet/config.json").read_text()) | {"_name_or_path": "mine"}
        (path / "unet/config.json").write_text(json.dumps(own))
        assert main(["convert", str(path), str(tmp_path / "out"), "--dtype", "fp16"]) == 0
        assert json.loads((tmp_path / "out/tokenizer/vocab.json").read_text()) == {"own": 0}
        assert json.loads((tmp_path / "out/unet/config.json").read_text()) == own
        assert json.loads((tmp_path / "out/model_index.json").read_text()).keys() == index.keys()

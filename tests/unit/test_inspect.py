"""`dreambooth-ms inspect` says what a file is, and what it is not."""

import numpy as np
import pytest

from dreambooth_ms.cli.main import main
from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.open import open_tensor_file
from dreambooth_ms.formats.files.safetensors_file import write_safetensors
from dreambooth_ms.formats.files.stored import StoredTensor
from dreambooth_ms.formats.naming.formats import Format
from dreambooth_ms.formats.naming.lora_formats import LoraFormat
from tests.small_specs import SMALL
from tests.whole_loras import attention, write_lora_file
from tests.whole_models import write_model


@pytest.fixture
def inspect(capsys):
    """The lines that the command prints, by what they are about."""

    def run(path, *flags):
        assert main(["inspect", str(path), *flags]) == 0
        lines = capsys.readouterr().out.splitlines()
        return {name: value for name, _, value in (line.partition(": ") for line in lines)}

    return run


@pytest.mark.parametrize("form", Format, ids=lambda form: form.value)
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_model(tmp_path, inspect, family, form):
    path, model = write_model(form, tmp_path / "model", family, dtype=DType.F16)
    said = inspect(path)
    kind = {"diffusers": "folder", "stability": "safetensors file", "mindone": "MindSpore checkpoint"}[form.value]
    assert said["format"] == f"{form.value}, {kind}"
    assert said["family"] == f"{SMALL[family].family.value}, not in a published size"
    assert said["predicts"] == "noise (epsilon)"
    assert said["dtype"].startswith("F16 (")
    assert said["missing"] == "nothing"
    parameters = sum(np.prod(own.shape, dtype=int) for own in model.of_part("unet").values())
    assert said["unet"].startswith(
        f"{parameters:,} parameters in {len(model.of_part('unet')):,} tensors, channels 10-20-"
    )
    assert {part for part in said if part in ("vae", "text_encoder", "text_encoder_2")} == set(model.parts) - {"unet"}


def test_what_a_file_lacks_and_has_too_much(tmp_path, inspect):
    path, _ = write_model(Format.STABILITY, tmp_path / "model")
    tensors = {n: t for n, t in open_tensor_file(path).tensors.items() if not n.startswith("first_stage_model.")}
    write_safetensors(tmp_path / "no_vae.safetensors", tensors)
    assert inspect(tmp_path / "no_vae.safetensors")["missing"] == "the whole vae"
    tensors["model.diffusion_model.surplus"] = StoredTensor.of(np.zeros(3, np.float32))
    write_safetensors(tmp_path / "more.safetensors", tensors)
    said = inspect(tmp_path / "more.safetensors")["does not fit"]
    assert said == "the whole vae; 1 unexpected (model.diffusion_model.surplus)"


def test_velocity_and_averages_and_metadata(tmp_path, inspect):
    path, _ = write_model(Format.STABILITY, tmp_path / "model", "sd21", prediction_type="v_prediction")
    tensors = dict(open_tensor_file(path).tensors)
    averaged = next(name for name in tensors if name.startswith("model.diffusion_model."))
    tensors[f"model_ema.{averaged.removeprefix('model.').replace('.', '')}"] = tensors[averaged]
    metadata = open_tensor_file(path).metadata | {"note": "x" * 500}
    write_safetensors(tmp_path / "ema.safetensors", tensors, metadata)
    said = inspect(tmp_path / "ema.safetensors")
    assert said["predicts"] == "velocity (v_prediction)"
    assert said["moving averages (EMA)"] == "of 1 weight"
    assert said["metadata note"] == f"{'x' * 200}… (500 characters)"


def test_what_is_not_finite_is_told(tmp_path, inspect):
    path, _ = write_model(Format.STABILITY, tmp_path / "model")
    tensors = dict(open_tensor_file(path).tensors)
    for name, bad in (
        ("model.diffusion_model.out.2.bias", np.nan),
        ("first_stage_model.decoder.conv_out.bias", np.inf),
    ):
        tensors[name] = StoredTensor.of(np.full(tensors[name].shape, bad, np.float32))
    write_safetensors(tmp_path / "bent.safetensors", tensors)
    assert (
        inspect(tmp_path / "bent.safetensors")["NaN or infinity"]
        == "in 2 tensors (unet.conv_out.bias, vae.decoder.conv_out.bias)"
    )
    assert "NaN or infinity" not in inspect(path)


def test_a_lora(tmp_path, inspect):
    base, _ = write_model(Format.DIFFUSERS, tmp_path / "base")
    path, lora = write_lora_file(LoraFormat.KOHYA, tmp_path / "lora", dtype=DType.F16)
    said = inspect(path, "--base", str(base))
    assert said["format"] == "LoRA, kohya, safetensors file"
    assert (said["family"], said["dtype"]) == ("SD 1.x", "F16")
    assert (said["rank"], said["alpha"]) == ("2, 4", "1, 3")
    count = sum(own.down.size + own.up.size for own in lora.adapter.parts["unet"].values())
    assert said["unet"] == f"{count:,} parameters in {len(lora.adapter.parts['unet'])} layers"
    assert said["metadata ss_network_dim"] == "4"


def test_an_alpha_that_the_file_does_not_hold_is_assumed_aloud(tmp_path, inspect):
    base, _ = write_model(Format.STABILITY, tmp_path / "base", "sdxl")
    path, _ = write_lora_file(
        LoraFormat.MINDONE, tmp_path / "lora", "sdxl", choose=attention, ranks=(4,), alphas=(4.0,)
    )
    said = inspect(path, "--base", str(base))
    assert said["note"].startswith("no alpha in the file for ")
    assert said["note"].endswith(" layers: it is taken as the rank (4).")


@pytest.mark.parametrize("form", [Format.DIFFUSERS, Format.STABILITY], ids=lambda form: form.value)
def test_an_autoencoder_alone(tmp_path, inspect, form):
    path, _ = write_model(form, tmp_path / "model")
    if form is Format.DIFFUSERS:
        path = path / "vae/diffusion_pytorch_model.safetensors"
    else:
        prefix = "first_stage_model."
        own = {n.removeprefix(prefix): t for n, t in open_tensor_file(path).tensors.items() if n.startswith(prefix)}
        path = tmp_path / "vae.safetensors"
        write_safetensors(path, own)
    said = inspect(path)
    assert said["format"] == f"autoencoder alone, {form.value}, safetensors file"
    assert said["missing"] == "nothing"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("joint_blocks.0.x", "an SD 3 model"),
        ("double_blocks.0.img_attn.weight", "a Flux model"),
        ("control_model.x", "a ControlNet"),
        ("mid_block.x", "a UNet alone, in diffusers' naming without its folder"),
    ],
)
def test_another_kind_of_model_is_reported_by_its_name(tmp_path, capsys, name, kind):
    write_safetensors(tmp_path / "file", {name: StoredTensor.of(np.zeros(3, np.float32))})
    assert main(["inspect", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err == (
        f"dreambooth-ms: error: {tmp_path}/file: this is {kind}; expected a model of SD 1.x, SD 2.x or SDXL\n"
    )

"""One reader for LoRAs: whatever is odd about a file or folder, every command says the same of it, before any work."""

import io
import json
import shutil
from contextlib import redirect_stderr
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dreambooth_ms.adapters.file import holds_adapter, open_adapter
from dreambooth_ms.cli.main import main
from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files.open import open_tensor_file
from dreambooth_ms.formats.files.safetensors_file import write_safetensors
from dreambooth_ms.formats.files.stored import StoredTensor
from dreambooth_ms.formats.naming.formats import Format
from dreambooth_ms.formats.naming.lora_formats import LoraFormat
from dreambooth_ms.sampling.prompts import ModelAdapters
from dreambooth_ms.weights.opened_model import open_model
from tests.small_specs import PUBLISHED, SMALL
from tests.whole_loras import attention, random_lora, write_lora_as, write_lora_file
from tests.whole_models import write_model

SPEC = SMALL["sd15"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(Format.DIFFUSERS, tmp_path_factory.mktemp("base") / "model")[0]


def bent_file(path, change):
    """A LoRA of kohya's after a change of its tensors, by name."""
    source, _ = write_lora_file(LoraFormat.KOHYA, path.with_name("whole"), choose=attention)
    tensors = {name: tensor.read() for name, tensor in open_tensor_file(source).tensors.items()}
    change(tensors, next(name for name in tensors if name.endswith("to_q.lora_down.weight")))
    write_safetensors(path, {name: StoredTensor.of(values) for name, values in tensors.items()})
    return path


def set_to(values):
    """Give the first A a value."""

    def change(tensors, down):
        tensors[down] = values(tensors[down])

    return change


def with_number(number):
    def values(before):
        after = before.copy()
        after.reshape(-1)[-1] = number
        return after

    return values


def set_alpha(value):
    def change(tensors, down):
        tensors[down.replace("lora_down.weight", "alpha")] = value

    return change


def twice(tensors, down):
    """A layer in kohya's names and in diffusers'."""
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors[f"{layer}.lora_A.weight"] = tensors[down]


def answers(path, base, target):
    """What each command says of a LoRA, by command."""
    said = {}
    commands = {
        "inspect": [str(path), "--base", str(base)],
        "convert": [str(path), str(target / "out.safetensors"), "--format", "diffusers", "--base", str(base)],
        "merge": ["--base", str(base), "--lora", str(path), "--target", str(target / "merged")],
    }
    for command, flags in commands.items():
        with redirect_stderr(io.StringIO()) as lines:
            assert main([command, *flags]) == 2, command
        said[command] = lines.getvalue().strip().removeprefix("dreambooth-ms: error: ")
    with pytest.raises(WeightError) as error:
        ModelAdapters(SimpleNamespace(opened=lambda: open_model(base), path=base), [path])
    return said | {"sample": str(error.value)}


ODD = {
    "int8": (set_to(lambda v: v.astype(np.int8)), "lora_down.weight holds I8, not numbers of a LoRA"),
    "rank 0": (set_to(lambda v: v[:0]), "1 of another shape"),
    "NaN": (set_to(with_number(np.nan)), "NaN or infinity in 1 of its tensors (unet."),
    "infinity": (set_to(with_number(-np.inf)), "NaN or infinity in 1 of its tensors (unet."),
    "more than float32": (set_to(lambda v: v.astype(np.float64) + 1e300), "NaN or infinity in 1 of its tensors (unet."),
    "alpha NaN": (set_alpha(np.float32(np.nan)), "NaN or infinity in 1 of its tensors (unet."),
    "alpha true": (set_alpha(np.array(True)), "alpha holds BOOL, not numbers of a LoRA"),
    "alpha of two": (set_alpha(np.ones(2, np.float32)), "1 of another shape"),
    "twice": (twice, "1 there more than once"),
    "norms": (lambda tensors, down: tensors.update({"lora_unet_x.w_norm": np.ones(2)}), "trained with norms (.w_norm)"),
}


@pytest.mark.parametrize("odd", ODD)
def test_what_is_odd_is_said_alike_and_nothing_is_written(tmp_path, base, odd):
    change, expected = ODD[odd]
    path = bent_file(tmp_path / "odd.safetensors", change)
    before = sorted(tmp_path.iterdir())
    said = answers(path, base, tmp_path)
    assert len(set(said.values())) == 1, said
    assert f"{path}" in said["sample"]
    assert expected in said["sample"]
    assert "\n" not in said["sample"]
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("alpha", ["auto", "8", [8], True, 10**400])
def test_an_alpha_of_peft_that_is_no_number_is_said_alike(tmp_path, base, alpha):
    path, _ = write_lora_file(LoraFormat.PEFT, tmp_path / "lora", choose=attention, ranks=(4,), alphas=(2.0,))
    config = path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": alpha}))
    said = answers(path, base, tmp_path)
    assert len(set(said.values())) == 1, said
    assert f"lora_alpha {alpha!r} is not a number" in said["sample"]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64])
def test_an_alpha_is_one_number_of_any_shape_and_type(tmp_path, shape, dtype):
    path = bent_file(tmp_path / "lora.safetensors", set_alpha(np.full(shape, 3, dtype)))
    found = open_adapter(path, [SPEC]).adapter.updates
    assert next(own.alpha for own in found.values()) == 3.0


class TestFolders:
    @pytest.fixture
    def lora(self, tmp_path):
        return write_lora_file(LoraFormat.DIFFUSERS, tmp_path / "lora", choose=attention)[0]

    def test_one_lora_of_any_name_is_read(self, tmp_path, lora):
        folder = tmp_path / "one"
        folder.mkdir()
        shutil.copy(lora, folder / "my-dog.safetensors")
        (folder / "README.md").write_text("a dog")
        (folder / "._my-dog.safetensors").write_bytes(b"of a Mac")
        save_file({"<dog>": torch.ones(24)}, folder / "embedding.safetensors")
        assert holds_adapter(folder)
        adapter = open_adapter(folder, [SPEC]).adapter
        assert adapter.parts.keys() == {"unet"}
        assert adapter.words["<dog>"]["text_encoder"].tolist() == [[1.0] * 24]

    def test_a_pickle_under_diffusers_name_is_read(self, tmp_path, lora):
        from safetensors.torch import load_file

        folder = tmp_path / "pickled"
        folder.mkdir()
        torch.save(load_file(lora), folder / "pytorch_lora_weights.bin")
        shutil.copy(lora, folder / "other.safetensors")
        assert open_adapter(folder, [SPEC]).path == folder
        (folder / "pytorch_lora_weights.safetensors").write_bytes(b"first of all")
        with pytest.raises(WeightError, match=r"pytorch_lora_weights\.safetensors: not a readable"):
            open_adapter(folder, [SPEC])

    def test_several_are_named_by_every_command(self, tmp_path, lora, base):
        folder = tmp_path / "several"
        folder.mkdir()
        for name in ("a.safetensors", "b.safetensors"):
            shutil.copy(lora, folder / name)
        said = answers(folder, base, tmp_path)
        expected = f"{folder}: holds 2 adapters (a.safetensors, b.safetensors); name one of these files"
        assert set(said.values()) == {expected}

    def test_what_is_there_instead_is_said(self, tmp_path):
        with pytest.raises(WeightError, match=r"holds no LoRA, such as pytorch_lora_weights.safetensors \(found: noth"):
            open_adapter(tmp_path)
        torch.save({"first.weight": torch.zeros(768)}, tmp_path / "classifier.bin")
        with pytest.raises(WeightError, match=r"this is of an unknown kind \(it holds first.weight\); expected a LoRA"):
            open_adapter(tmp_path)
        assert not holds_adapter(tmp_path)


class TestBases:
    """A LoRA for a model of sizes of its own, inspected and converted without --base."""

    @pytest.fixture
    def run(self, tmp_path, base):
        (tmp_path / "run").mkdir()
        path, _ = write_lora_file(LoraFormat.DIFFUSERS, tmp_path / "run/pytorch_lora_weights", choose=attention)
        (path.parent / "config.yaml").write_text(f"model:\n  pretrained_model_name_or_path: {base}\n")
        return path.parent

    def test_that_of_its_run_is_found(self, run, tmp_path, capsys):
        assert main(["inspect", str(run)]) == 0
        assert "family: SD 1.x" in capsys.readouterr().out
        assert main(["convert", str(run), str(tmp_path / "peft"), "--format", "peft"]) == 0
        assert main(["convert", str(run / "pytorch_lora_weights.safetensors"), str(tmp_path / "out.ckpt")]) == 0

    def test_one_that_is_gone_is_told(self, run, capsys):
        (run / "config.yaml").write_text("pretrained_model_name_or_path: /gone/model\n")
        assert main(["inspect", str(run)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith(
            "its own base, /gone/model, is not on this machine; name one of the same sizes with --base"
        )

    def test_pefts_settings_name_it_too(self, tmp_path, base, capsys):
        path, _ = write_lora_file(LoraFormat.PEFT, tmp_path / "lora", choose=attention)
        config = path / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(base)}))
        assert main(["inspect", str(path)]) == 0
        assert "format: LoRA, peft" in capsys.readouterr().out

    @pytest.mark.parametrize("form", [LoraFormat.KOHYA, LoraFormat.PEFT], ids=lambda form: form.value)
    def test_without_any_the_flag_is_named(self, tmp_path, capsys, form):
        path, _ = write_lora_file(form, tmp_path / "lora", choose=attention)
        for command in (["inspect", str(path)], ["convert", str(path), str(tmp_path / "out"), "--format", "peft"]):
            assert main(command) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.endswith("; if its base has sizes of its own, name it with --base")

    def test_a_published_size_on_another_base_of_the_same_family_is_told_by_what_does_not_fit(self, tmp_path, base):
        lora = random_lora(
            PUBLISHED["sd15"], tmp_path, choose=lambda layer: ".mid_block." in layer and ".attn" in layer
        )
        write_lora_as(lora, tmp_path / "lora.safetensors", LoraFormat.KOHYA)
        with pytest.raises(
            WeightError, match=rf"does not fit a LoRA of SD 1\.x .* for {base}: 8 of another shape \(unet"
        ):
            open_adapter(tmp_path / "lora.safetensors", [SPEC], base)


class TestOtherFiles:
    """Where a LoRA or a model is expected."""

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("a1111.pt", {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(2, 768)}}),
            (
                "first.pt",
                {"string_to_token": {"dog": torch.tensor(2)}, "string_to_param": {"dog": torch.zeros(2, 768)}},
            ),
            ("diffusers.bin", {"<new1>": torch.zeros(768)}),
            ("sd1.safetensors", {"emb_params": torch.zeros(2, 768)}),
            ("sdxl.safetensors", {"clip_l": torch.zeros(2, 768), "clip_g": torch.zeros(2, 1280)}),
        ],
    )
    def test_an_embedding_is_called_one(self, tmp_path, capsys, name, content):
        path = tmp_path / name
        (save_file if name.endswith("safetensors") else torch.save)(content, path)
        with pytest.raises(WeightError, match=f"{name}: this is a textual inversion embedding; expected a model"):
            open_model(path)
        assert main(["inspect", str(path)]) == 0
        assert "format: textual inversion embedding" in capsys.readouterr().out

    @pytest.mark.parametrize("name", ["fp8.safetensors", "fp8.pt"])
    def test_fp8_is_called_fp8(self, tmp_path, capsys, name):
        content = {"lora_unet_x.lora_down.weight": torch.zeros(2, 3).to(torch.float8_e4m3fn)}
        (save_file if name.endswith("safetensors") else torch.save)(content, tmp_path / name)
        for command in (["inspect", str(tmp_path / name)], ["convert", str(tmp_path / name), str(tmp_path / "out")]):
            assert main(command) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert "is fp8, " in line
            assert line.endswith("which is not read); use the same model in fp16 or bf16")

"""Updates of every kind: told, merged, put on networks, converted, made LoRAs of, and refused where damaged."""

import json
from dataclasses import replace

import numpy as np
import pytest
from mindspore import nn

from dreambooth_ms.adapters.adapter import Adapter
from dreambooth_ms.adapters.attach import attach
from dreambooth_ms.adapters.file import open_adapter
from dreambooth_ms.adapters.formulas import Update
from dreambooth_ms.adapters.writing import write_adapter
from dreambooth_ms.cli.main import main
from dreambooth_ms.config.commands import ExtractConfig
from dreambooth_ms.config.load import load
from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files.open import open_tensor_file, write_tensors
from dreambooth_ms.formats.files.stored import StoredTensor
from dreambooth_ms.formats.naming.formats import Format
from dreambooth_ms.formats.naming.lora_formats import LoraFormat, lora_layers
from dreambooth_ms.models.parameters import public_parameters
from dreambooth_ms.ops import Conv2d, Dense
from dreambooth_ms.weights.model_writing import plan_model
from dreambooth_ms.weights.opened_model import open_model
from tests.small_specs import PUBLISHED
from tests.update_layers import LAYERS, error, kohya_names, weights_of
from tests.whole_loras import lora_update
from tests.whole_models import RUNNING, RUNNING_SDXL, random_model, write_model

SQUARE, CROSS, POINT, CONV = LAYERS
KINDS = ("LoRA", "DoRA", "LoHa", "LoKr", "OFT of rows", "IA3", "difference")
MIXED = {SQUARE: "LoHa", CROSS: "DoRA", POINT: "LoKr", CONV: "LoHa"}
ONE = lora_update(np.ones((1, 2), np.float32), np.ones((3, 1), np.float32))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    plan_model(random_model(RUNNING, folder), Format.DIFFUSERS).write(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def weights():
    return weights_of()


@pytest.fixture
def written(tmp_path, weights):
    """Writes a file in kohya's names, with changes of its tensors."""

    def write(kinds, name="source.safetensors", change=None):
        tensors = kohya_names(kinds, weights)
        if change:
            change(tensors)
        write_tensors(tmp_path / name, tensors)
        return tmp_path / name

    return write


def command(capsys, *arguments, status=0):
    """What a command says."""
    assert main([str(one) for one in arguments]) == status
    said = capsys.readouterr()
    return said.out + said.err


def convert(capsys, source, target, form, base, *more, status=0):
    return command(capsys, "convert", source, target, "--format", form, "--base", base, *more, status=status)


def updates_in(path):
    return open_adapter(path, [RUNNING]).adapter.parts["unet"]


class TestTold:
    def test_kinds_with_ranks_alphas_and_counts(self, written, base, capsys):
        said = command(capsys, "inspect", written(MIXED), "--base", base)
        assert "format: LoHa and LoKr and DoRA, kohya, safetensors file" in said
        assert (
            "updates: LoHa, rank 4, alpha 2: 2 layers; LoKr, rank 2, alpha 2: 1 layer; DoRA, rank 4, alpha 2: 1 layer"
            in said
        )

    @pytest.mark.parametrize("kind", [*KINDS, "difference with its bias"])
    def test_every_kind_alone(self, written, base, capsys, kind):
        layer = CONV if kind == "difference with its bias" else SQUARE
        said = command(capsys, "inspect", written({layer: kind}), "--base", base)
        assert f"updates: {kind.removesuffix(' with its bias')}" in said

    def test_an_alpha_that_is_nowhere_is_assumed_aloud_and_can_be_given(self, written, base, weights, capsys, tmp_path):
        source = written({SQUARE: "LoHa"}, change=lambda tensors: tensors.pop(next(n for n in tensors if "alpha" in n)))
        opened = open_adapter(source, [RUNNING])
        assert opened.notes == ["no alpha in the file for 1 of 1 layer: it is taken as the rank (4)."]
        (own,) = opened.adapter.updates.values()
        (given,) = opened.with_alpha(2.0).adapter.updates.values()
        assert error(given.delta(weights[SQUARE]), own.delta(weights[SQUARE]) / 2) < 1e-6
        convert(capsys, source, tmp_path / "out.safetensors", "kohya", base, "--alpha", "2")
        assert (
            error(updates_in(tmp_path / "out.safetensors")[SQUARE].delta(weights[SQUARE]), given.delta(weights[SQUARE]))
            == 0
        )


class TestMerged:
    def test_the_sum_of_several_files_kinds_and_layers(self, written, base, weights, tmp_path, capsys):
        files = [
            written(dict(zip(LAYERS, kinds, strict=True)), f"{number}.safetensors")
            for number, kinds in enumerate((KINDS[:4], KINDS[3:], ("IA3", "LoHa", "LoRA", "difference with its bias")))
        ]
        more = [word for file in files for word in ("--lora", file)]
        said = command(capsys, "merge", "--base", base, "--target", tmp_path / "out", "--scale", "0.5", *more)
        assert f"{files[0]}: LoKr and LoHa and LoRA and DoRA of 4 layers of unet" in said
        before, after = open_model(base).tensors, open_model(tmp_path / "out").tensors
        adapters = [updates_in(file) for file in files]
        for layer, weight in weights.items():
            expected = weight + 0.5 * sum(own[layer].delta(weight) for own in adapters)
            assert np.abs(after[f"unet.{layer}.weight"].read() - expected).max() < 1e-6, layer
        bias = adapters[2][CONV].factors["diff_b"]
        assert np.abs(after[f"unet.{CONV}.bias"].read() - before[f"unet.{CONV}.bias"].read() - bias / 2).max() < 1e-6
        assert sum(not np.array_equal(after[name].read(), own.read()) for name, own in before.items()) == 5


class Layers(nn.Cell):
    def __init__(self, weights):
        super().__init__()
        self.linear, self.conv = Dense(64, 32), Conv2d(32, 32, 3, 1, 1)


class TestPutOnNetworks:
    @pytest.mark.parametrize("kind", [*KINDS[1:], "OFT"])
    def test_in_the_weight_each_with_its_strength(self, weights, kind):
        network, found = Layers(weights), {}
        parameters = public_parameters(network)
        for name, layer in (("linear", CROSS), ("conv", CONV)):
            parameters[f"{name}.weight"].write(weights[layer])
        own = updates_by_hand({CROSS: kind, CONV: kind}, weights)
        beside = lora_update(np.ones((1, 64), np.float32), np.ones((32, 1), np.float32))
        adapters = [Adapter({"unet": {"linear": own[CROSS], "conv": own[CONV]}}), Adapter({"unet": {"linear": beside}})]
        attach({"unet": network}, adapters).set_scales([0.5, 2.0])
        for name, layer, more in (("linear", CROSS, 2), ("conv", CONV, 0)):
            expected = weights[layer] + 0.5 * own[layer].delta(weights[layer]) + more
            found[name] = np.abs(parameters[f"{name}.weight"].read() - expected).max()
        assert max(found.values()) < 1e-5


def updates_by_hand(kinds, weights):
    """Updates as if they had been read, without a file."""
    names = {"weight": "ia3", "on_input": "ia3_on_input", "lora_down.weight": "lora_A.weight"}
    names |= {"lora_up.weight": "lora_B.weight"}
    updates = {}
    for layer, kind in kinds.items():
        tensors = {name.rpartition(".")[2]: value for name, value in kohya_names({layer: kind}, weights).items()}
        if "LoRA" in kind or "DoRA" in kind:
            tensors = {name.partition(".")[2]: value for name, value in kohya_names({layer: kind}, weights).items()}
        updates[layer] = Update({names.get(name, name): value for name, value in tensors.items()})
    return updates


class TestFormats:
    @pytest.mark.parametrize(
        ("kind", "forms"),
        [
            ("DoRA", ("peft", "kohya_diffusers", "diffusers_peft", "kohya")),
            ("LoHa", ("peft", "kohya_diffusers", "kohya")),
            ("LoKr", ("peft", "kohya_diffusers", "kohya")),
            ("OFT of rows", ("kohya_diffusers", "kohya")),
            ("IA3", ("kohya_diffusers", "kohya")),
            ("difference", ("kohya_diffusers", "kohya")),
        ],
    )
    def test_there_and_back_no_number_changes(self, written, base, tmp_path, capsys, kind, forms):
        source = path = written(dict.fromkeys(LAYERS, kind))
        for number, form in enumerate(forms):
            target = tmp_path / f"{number}{'' if form == 'peft' else '.safetensors'}"
            convert(capsys, path, target, form, base)
            path = target
        before, after = (open_tensor_file(one).tensors for one in (source, path))
        for name, own in before.items():
            assert np.array_equal(after[name].read().reshape(own.shape), own.read()), name
        assert {name.rpartition(".")[2] for name in after.keys() - before.keys()} <= {"alpha"}

    def test_sdxl_in_either_spelling(self, tmp_path):
        layer = "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"
        text = "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"
        weights = lora_layers(RUNNING_SDXL)
        own = {layer: np.zeros(weights[f"unet.{layer}"]), "fc1": np.zeros(weights[text])}
        (first, second), found = (kohya_names({name: "LoHa"}, own) for name in own), []
        for path in ("input_blocks_3_1_transformer_blocks_1_attn1_to_q", layer.replace(".", "_")):
            tensors = {f"lora_unet_{path}.{name.rpartition('.')[2]}": value for name, value in first.items()}
            tensors |= {
                n.replace("lora_unet_", "lora_te2_text_model_encoder_layers_0_mlp_"): v for n, v in second.items()
            }
            write_tensors(tmp_path / "a.safetensors", tensors)
            found.append(open_adapter(tmp_path / "a.safetensors", [RUNNING_SDXL]).adapter)
            assert found[-1].updates.keys() == {f"unet.{layer}", text}
            form = (LoraFormat.KOHYA, LoraFormat.KOHYA_DIFFUSERS)[len(found) - 1]
            write_adapter(found[-1], tmp_path / "b.safetensors", form, RUNNING_SDXL)
            assert open_tensor_file(tmp_path / "b.safetensors").tensors.keys() == tensors.keys()

    @pytest.mark.parametrize(
        ("kinds", "form", "said"),
        [
            (
                {SQUARE: "LoHa"},
                "diffusers",
                "1 layer of LoHa have no place in the naming of diffusers; choose --format",
            ),
            (
                {SQUARE: "LoHa"},
                "mindone",
                "choose --format peft or kohya or kohya_diffusers, or make it a LoRA by --rank",
            ),
            ({SQUARE: "DoRA"}, "diffusers", "choose --format diffusers_peft or peft or kohya or kohya_diffusers, or"),
            ({SQUARE: "IA3"}, "peft", "1 layer of IA3 have no place in the naming of peft; choose --format kohya or"),
            ({SQUARE: "DoRA", CROSS: "LoRA"}, "peft", "2 layers of DoRA and LoRA have no place"),
            ({SQUARE: "DoRA", CROSS: "LoRA"}, "diffusers_peft", "choose --format kohya or kohya_diffusers, or make it"),
            ({SQUARE: "OFT"}, "diffusers", "choose --format peft or kohya or kohya_diffusers, or make it a LoRA"),
            ({SQUARE: "OFT", CROSS: "IA3"}, "peft", "2 layers of OFT and IA3 have no place in the naming of peft; "),
            ({SQUARE: "OFT", CROSS: "IA3"}, "diffusers", "of diffusers; choose --format kohya or kohya_diffusers, or"),
        ],
    )
    def test_one_without_a_place_names_one_that_has(self, written, base, tmp_path, capsys, kinds, form, said):
        target = tmp_path / ("out" if form == "peft" else "out.ckpt" if form == "mindone" else "out.safetensors")
        lines = convert(capsys, written(kinds), target, form, base, status=2)
        assert said in lines
        assert len(lines.splitlines()) == 1
        assert not target.exists()

    def test_the_series_of_a_rotation_has_a_place_in_peft_alone(self, weights, tmp_path):
        """In tensors nothing says it, and so beside another kind, which peft has no place for, there is none."""
        exact = updates_by_hand({SQUARE: "OFT"}, weights)[SQUARE].tensors() | {"oft_terms": np.array(0)}
        own = {SQUARE: Update(exact)} | updates_by_hand({CROSS: "IA3"}, weights)
        for layers, remedy in (({SQUARE: own[SQUARE]}, "choose --format peft, or make"), (own, "of kohya; make it")):
            with pytest.raises(WeightError, match=remedy):
                write_adapter(Adapter({"unet": layers}), tmp_path / "a.safetensors", LoraFormat.KOHYA, RUNNING)
        assert not any(tmp_path.iterdir())

    def test_sizes_that_no_settings_of_peft_give(self, written, base, tmp_path, capsys):
        def change(tensors):
            name = next(name for name in tensors if name.endswith("lokr_w1"))
            stem = name.removesuffix("w1")
            tensors |= {name: tensors[name][:2], f"{stem}w2_a": np.ones((16, 2), np.float32)}

        lines = convert(capsys, written({SQUARE: "LoKr"}, change=change), tmp_path / "out", "peft", base, status=2)
        assert "no settings of peft give factors of these sizes; choose --format kohya, or make it a LoRA" in lines
        assert not (tmp_path / "out").exists()


class TestAsLora:
    @pytest.mark.parametrize("kind", KINDS)
    def test_of_full_rank_it_is_the_same(self, written, base, weights, tmp_path, capsys, kind):
        source = written({SQUARE: kind, CONV: kind})
        convert(capsys, source, tmp_path / "out.safetensors", "kohya", base, "--rank", "99")
        before, after = updates_in(source), updates_in(tmp_path / "out.safetensors")
        for layer, own in before.items():
            assert after[layer].is_lora
            assert error(after[layer].delta(weights[layer]), own.delta(weights[layer])) < 1e-5, layer

    def test_of_a_lower_rank_it_is_the_nearest_and_what_is_lost_is_told(self, written, base, weights, tmp_path, capsys):
        source = written({SQUARE: "difference", CROSS: "LoRA"})
        said = convert(capsys, source, tmp_path / "out.safetensors", "diffusers", base, "--rank", "3")
        before, after, lost, total = updates_in(source), updates_in(tmp_path / "out.safetensors"), 0, 0
        for layer, own in before.items():
            delta = own.delta(weights[layer])
            left, values, right = np.linalg.svd(delta)
            best = left[:, :3] * values[:3] @ right[:3]
            assert (after[layer].rank, error(after[layer].delta(delta), best) < 1e-5) == (3, True), layer
            lost, total = lost + (values[3:] ** 2).sum(), total + (values**2).sum()
        assert f"As a LoRA it has rank 3: {lost / total:.2%} of the squared norm of what was trained is lost." in said

    def test_a_lora_of_no_larger_rank_stays(self, written, base, tmp_path, capsys):
        source = written({SQUARE: "LoRA", CROSS: "DoRA"})
        convert(capsys, source, tmp_path / "out.safetensors", "kohya", base, "--rank", "4")
        before, after = (open_tensor_file(one).tensors for one in (source, tmp_path / "out.safetensors"))
        same = [name for name in before if SQUARE.replace(".", "_") in name]
        assert len(same) == 3
        assert all(before[name].read().tobytes() == after[name].read().tobytes() for name in same)

    def test_a_base_is_needed_only_where_it_matters(self, tmp_path, capsys, monkeypatch):
        layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
        weight = np.zeros(lora_layers(PUBLISHED["sd15"])[layer], np.float32)
        for kind, status in (("LoHa", 0), ("DoRA", 2), ("OFT of rows", 2), ("IA3", 2)):
            write_tensors(tmp_path / f"{kind}.safetensors", kohya_names({layer[5:]: kind}, {layer[5:]: weight}))
            arguments = (tmp_path / f"{kind}.safetensors", tmp_path / f"{kind} out.safetensors")
            said = command(capsys, "convert", *arguments, "--format", "kohya", "--rank", "2", status=status)
            assert ("by what they add to its base; name it with --base" in said) == bool(status)

    def test_biases_have_no_place(self, written, base, tmp_path, capsys):
        source = written({CONV: "difference with its bias"})
        said = convert(capsys, source, tmp_path / "out.safetensors", "kohya", base, "--rank", "2", status=2)
        assert "a LoRA has no place for its biases (of 1 layer)" in said


class TestExtracted:
    TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"

    @pytest.fixture
    def tuned(self, base, weights, tmp_path):
        """A model with four changed layers, a bias, a norm and a table of words."""
        model, rng = open_model(base), np.random.default_rng(5)
        tensors = dict(model.tensors)
        for name in (f"unet.{CROSS}.weight", f"unet.{CONV}.weight", f"{self.TEXT}.weight", f"unet.{CONV}.bias"):
            shape = tensors[name].shape
            factors = rng.standard_normal((shape[0], 2)), rng.standard_normal((2, int(np.prod(shape[1:]))))
            added = (factors[0] @ factors[1]).reshape(shape) / 50 if len(shape) > 1 else np.ones(shape)
            tensors[name] = StoredTensor.of((tensors[name].read() + added).astype(np.float32))
        for name in ("unet.conv_norm_out.weight", "text_encoder.text_model.embeddings.token_embedding.weight"):
            tensors[name] = StoredTensor.of(tensors[name].read() + np.float32(1))
        plan_model(replace(model, tensors=tensors), Format.STABILITY).write(tmp_path / "tuned.safetensors")
        return tmp_path / "tuned.safetensors"

    def extract(self, capsys, base, tuned, target, *more, status=0):
        flags = ("--base", base, "--tuned", tuned, "--target", target, "--format", "kohya", *more)
        return command(capsys, "extract", *flags, status=status)

    def test_what_two_models_differ_by(self, base, tuned, tmp_path, capsys):
        said = self.extract(capsys, base, tuned, tmp_path / "out.safetensors", "--rank", "2")
        found = open_adapter(tmp_path / "out.safetensors", [RUNNING]).adapter.updates
        assert found.keys() == {f"unet.{CROSS}", f"unet.{CONV}", self.TEXT}
        before, after = open_model(base).tensors, open_model(tuned).tensors
        for layer, own in found.items():
            difference = after[f"{layer}.weight"].read() - before[f"{layer}.weight"].read()
            assert (own.rank, error(own.delta(difference), difference) < 1e-4) == (2, True), layer
        assert "As a LoRA it has rank 2: 0.00% of the squared norm" in said
        assert "A LoRA has no place for 3 tensors that differ, too (" in said
        assert "token_embedding" in said
        assert said.splitlines()[-1].endswith("a LoRA of 3 layers of unet, text_encoder of SD 1.x")

    def test_by_a_share_of_the_singular_values(self, base, tuned, tmp_path, capsys):
        self.extract(capsys, base, tuned, tmp_path / "out.safetensors", "--extract_ratio", "0.9", "--dtype", "fp16")
        found = open_adapter(tmp_path / "out.safetensors", [RUNNING])
        assert found.dtype.value == "F16"
        assert {own.rank for own in found.adapter.updates.values()} == {1}

    def test_a_cast_alone_is_no_difference(self, base, tmp_path, capsys):
        command(capsys, "convert", base, tmp_path / "half.safetensors", "--dtype", "fp16")
        said = self.extract(
            capsys, base, tmp_path / "half.safetensors", tmp_path / "x.safetensors", "--rank", "2", status=2
        )
        assert f"its layers are those of {base}: there is nothing to extract" in said

    def test_kohyas_flags_are_understood(self):
        flags = ["--model_org", "a", "--model_tuned", "b", "--save_to", "c.safetensors", "--dim", "4"]
        found = load(ExtractConfig, flags).extraction
        assert (found.base, found.tuned, found.target, found.rank) == ("a", "b", "c.safetensors", 4)

    def test_of_other_sizes_it_is_refused(self, base, tmp_path, capsys):
        other, _ = write_model(Format.STABILITY, tmp_path / "other")
        said = self.extract(capsys, base, other, tmp_path / "x.safetensors", "--rank", "2", status=2)
        assert f"{other}: has layers of other sizes than {base}; name the base that it is made of" in said

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            ((), "--rank: missing; name one, or an --extract_ratio"),
            (("--rank", "2", "--extract_ratio", "0.5"), "--rank: decides as --extract_ratio does; leave one out"),
            (("--extract_ratio", "0"), "--extract_ratio: expected greater than 0 and at most 1, got 0"),
        ],
    )
    def test_one_of_rank_and_share(self, base, tuned, tmp_path, capsys, flags, said):
        assert said in self.extract(capsys, base, tuned, tmp_path / "out.safetensors", *flags, status=2)
        assert not (tmp_path / "out.safetensors").exists()


def without(end):
    return lambda tensors: tensors.pop(next(name for name in tensors if name.endswith(end)))


def changed(end, value, more=""):
    def change(tensors):
        name = next(name for name in tensors if name.endswith(end))
        tensors[name + more] = value(tensors[name]) if value else tensors[name]

    return change


def emptied(tensors):
    for end, part in (("lokr_w2_a", np.s_[:, :0]), ("lokr_w2_b", np.s_[:0])):
        changed(end, lambda value, part=part: value[part])(tensors)


def also(kind):
    return lambda tensors: tensors.update(kohya_names({SQUARE: kind}, weights_of()))


DAMAGED = {
    "a factor is missing": ("LoHa", without("hada_w2_b"), f"1 missing (unet 1: {SQUARE}.hada_w2_b)"),
    "half of a product is missing": ("LoKr", without("lokr_w2_a"), f"1 missing (unet 1: {SQUARE}.lokr_w2_a)"),
    "norms alone": ("DoRA", without("lora_up.weight"), f"1 missing (unet 1: {SQUARE}.lora_B.weight)"),
    "another layer's": (
        "LoHa",
        changed("hada_w1_a", lambda v: v[:5]),
        f"1 of another shape (unet 1: {SQUARE}: a weight",
    ),
    "ranks that differ": ("LoKr", changed("lokr_w2_b", lambda v: v[:1]), "1 of another shape"),
    "too few norms": ("DoRA", changed("dora_scale", lambda v: v[:5]), "1 of another shape"),
    "blocks of no square": ("OFT of rows", changed("oft_blocks", lambda v: v[..., 1:]), "1 of another shape"),
    "no triangle": ("OFT", changed("oft_R", lambda v: v[:, 1:]), "1 of another shape"),
    "a flat factor": ("OFT", changed("oft_R", lambda v: v[0]), "1 of another shape"),
    "a number": ("difference", changed("diff", lambda v: v[0, 0]), "1 of another shape"),
    "two kinds": ("LoHa", also("LoKr"), "has no update of several kinds (alpha, hada_w1_a, "),
    "whole weights": ("IA3", without("on_input"), "1 unexpected"),
    "NaN": (
        "LoKr",
        changed("lokr_w1", lambda v: v * np.nan),
        f"NaN or infinity in 1 of its tensors (unet.{SQUARE}.lokr_w1)",
    ),
    "a rank of 0": ("LoKr", emptied, "1 of another shape"),
    "both in place of each other": ("LoKr", changed("lokr_w1", None, "_a"), "1 of another shape"),
    "integers": (
        "LoHa",
        changed("hada_w1_a", lambda v: v.astype(np.int8)),
        "hada_w1_a holds I8, not numbers of a LoRA",
    ),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_what_is_damaged_is_told_in_a_line(written, base, tmp_path, capsys, how):
    kind, change, expected = DAMAGED[how]
    source = written({SQUARE: kind}, change=change)
    for arguments in (("inspect", source), ("convert", source, tmp_path / "out.safetensors", "--format", "kohya")):
        (line,) = command(capsys, *arguments, "--base", base, status=2).splitlines()
        assert str(source) in line
        assert expected in line
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("LoRA", {"use_dora": True}, "use_dora, but down_blocks"),
        (
            "OFT",
            {"num_cayley_neumann_terms": 10**30},
            "num_cayley_neumann_terms 1000000000000000000000000000000 is not a",
        ),
        ("OFT", {"num_cayley_neumann_terms": "5"}, "num_cayley_neumann_terms '5' is not a number from 1 to 1000"),
        ("OFT", {"coft": True, "eps": "a"}, "eps 'a' is not a number above 0"),
        ("LoKr", {"alpha": [2]}, "lora_alpha [2] is not a number"),
        ("LoKr of whole factors", {"alpha": 4, "r": 0}, "r 0 is not a number above 0"),
    ],
)
def test_settings_that_are_damaged(tmp_path, weights, kind, settings, said):
    names = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
    own = {SQUARE: kind.removesuffix(" of whole factors")}
    tensors = {}
    for name, value in kohya_names(own, weights).items():
        end = name.partition(".")[2]
        tensors[f"base_model.model.{SQUARE}.{names.get(end, end)}"] = value
    tensors.pop(f"base_model.model.{SQUARE}.alpha", None)
    if kind.endswith("whole factors"):
        stem = f"base_model.model.{SQUARE}.lokr_w2"
        tensors[stem] = tensors.pop(f"{stem}_a") @ tensors.pop(f"{stem}_b")
    (tmp_path / "lora").mkdir()
    write_tensors(tmp_path / "lora/adapter_model.safetensors", tensors)
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(WeightError) as raised:
        open_adapter(tmp_path / "lora", [RUNNING])
    assert f"{tmp_path / 'lora/adapter_config.json'}: {said}" in str(raised.value)


def test_an_update_of_another_size_is_told():
    with pytest.raises(WeightError, match="does not fit the base"):
        Update({"diff": np.ones((2, 3), np.float32)}).delta(np.ones((4, 3), np.float32))
    with pytest.raises(WeightError, match="does not fit the base"):
        ONE.delta(np.ones((4, 2), np.float32))

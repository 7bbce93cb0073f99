"""Custom Diffusion and embeddings of new words in the files of every program that writes them."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dreambooth_ms.adapters.file import holds_adapter, open_adapter
from dreambooth_ms.cli.main import main
from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files.stored import Container
from dreambooth_ms.formats.naming.formats import Format, spell
from dreambooth_ms.formats.naming.lora_formats import LoraFormat, OtherFormat, lora_layers
from dreambooth_ms.models.specs import SD_15, SD_21, SDXL_BASE
from dreambooth_ms.sampling.prompts import ModelAdapters
from dreambooth_ms.sampling.request import SampleRequest
from dreambooth_ms.weights.bundle import Schedule
from dreambooth_ms.weights.opened_model import open_model
from tests.small_specs import SMALL
from tests.whole_loras import write_lora_file

SPEC, XL = SMALL["sd15"], SMALL["sdxl"]
WIDTH, WIDTHS = 24, (24, 40)
WEIGHTS = "pytorch_custom_diffusion_weights"


def tensor(*shape, seed=0):
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def whole_weights(ends=("to_k", "to_v"), spec=SPEC):
    """Random weights of cross-attention, and biases where it has them, by the layers' names in the UNet."""
    layers = {name.removeprefix("unet."): shape for name, shape in lora_layers(spec).items() if ".attn2." in name}
    chosen = {name: shape for name, shape in layers.items() if name.endswith(ends)}
    weights = {f"{name}.weight": tensor(*shape, seed=n) for n, (name, shape) in enumerate(chosen.items())}
    return weights | {f"{n}.bias": tensor(shape[0]) for n, shape in chosen.items() if n.endswith("to_out.0")}


ALL_FOUR = ("to_k", "to_v", "to_q", "to_out.0")


def of_diffusers(weights):
    """The names that its script gives them."""
    for_diffusers = {}
    for name, value in weights.items():
        attention, _, rest = name.partition(".to_")
        kind, _, more = rest.partition(".")
        for_diffusers[f"{attention}.processor.to_{kind}_custom_diffusion.{more}"] = value
    return for_diffusers


def compressed(weights):
    return {
        name: {"u": tensor(len(value), 2, seed=1), "v": tensor(2, value.shape[1], seed=2)}
        for name, value in weights.items()
    }


def of_ldm(weights):
    return {spell(Format.STABILITY, f"unet.{name}", SPEC)[0].name: value for name, value in weights.items()}


def assert_replaced(adapter, weights):
    found = {
        f"{layer}.{parameter}": value
        for layer, own in adapter.parts["unet"].items()
        for parameter, value in own.tensors().items()
    }
    assert found.keys() == weights.keys()
    assert all(np.array_equal(value, weights[name]) for name, value in found.items())


def assert_words(adapter, **expected):
    assert adapter.words.keys() == expected.keys()
    for word, own in expected.items():
        assert adapter.words[word].keys() == own.keys()
        assert all(np.array_equal(adapter.words[word][name], rows) for name, rows in own.items()), word


def sd(rows):
    return {"text_encoder": np.atleast_2d(rows)}


class TestCustomDiffusion:
    @pytest.mark.parametrize("ends", [("to_k", "to_v"), ALL_FOUR])
    @pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
    def test_the_files_of_diffusers_script_are_one_adapter(self, tmp_path, ends, suffix):
        """Its .bin has an entry for self-attention, too, which holds nothing."""
        weights, word = whole_weights(ends), tensor(WIDTH)
        save = save_file if suffix == ".safetensors" else torch.save
        empty = {n.replace("attn2", "attn1").partition(".to_")[0] + ".processor": {} for n in weights}
        save(of_diffusers(weights) | ({} if suffix == ".safetensors" else empty), tmp_path / f"{WEIGHTS}{suffix}")
        save({"<new1>": word}, tmp_path / f"<new1>{suffix}")
        assert holds_adapter(tmp_path)
        opened = open_adapter(tmp_path, [SPEC])
        assert (opened.form, opened.container) == (OtherFormat.CUSTOM_DIFFUSION, Container.FOLDER)
        assert_replaced(opened.adapter, weights)
        assert_words(opened.adapter, **{"<new1>": sd(word)})
        assert not open_adapter(tmp_path / f"{WEIGHTS}{suffix}", [SPEC]).adapter.words

    def test_a_damaged_word_in_a_folder_is_refused_as_when_it_is_named(self, tmp_path):
        save_file(of_diffusers(whole_weights()), tmp_path / f"{WEIGHTS}.safetensors")
        (tmp_path / "<new1>.safetensors").write_bytes(b"cut off")
        (tmp_path / "notes.bin").write_bytes(b"of another program")
        for path in (tmp_path, tmp_path / "<new1>.safetensors"):
            with pytest.raises(WeightError, match=r"<new1>\.safetensors: "):
                open_adapter(path, [SPEC])

    def test_of_two_kinds_of_file_safetensors_is_read(self, tmp_path):
        weights = whole_weights()
        torch.save(of_diffusers(whole_weights(ALL_FOUR)), tmp_path / f"{WEIGHTS}.bin")
        save_file(of_diffusers(weights), tmp_path / f"{WEIGHTS}.safetensors")
        torch.save({"<new1>": tensor(WIDTH)}, tmp_path / "<new1>.bin")
        save_file({"<new1>": tensor(WIDTH, seed=1)}, tmp_path / "<new1>.safetensors")
        opened = open_adapter(tmp_path, [SPEC])
        assert_replaced(opened.adapter, weights)
        assert_words(opened.adapter, **{"<new1>": sd(tensor(WIDTH, seed=1))})

    def test_the_authors_delta_has_weights_and_words(self, tmp_path):
        weights, words = whole_weights(), {"<new1>": tensor(WIDTH), "<new2>": tensor(WIDTH, seed=1)}
        torch.save({"unet": weights, "modifier_token": words}, tmp_path / "delta.bin")
        adapter = open_adapter(tmp_path / "delta.bin", [SPEC]).adapter
        assert_replaced(adapter, weights)
        assert_words(adapter, **{word: sd(rows) for word, rows in words.items()})

    def test_their_delta_for_sdxl_has_a_list_for_each_word(self, tmp_path):
        weights, rows = whole_weights(spec=XL), [tensor(width, seed=n) for n, width in enumerate(WIDTHS)]
        torch.save({"unet": weights, "modifier_token": {"<new1>": rows}}, tmp_path / "delta.bin")
        adapter = open_adapter(tmp_path / "delta.bin", [XL]).adapter
        assert_replaced(adapter, weights)
        assert_words(adapter, **{"<new1>": {"text_encoder": rows[0][None], "text_encoder_2": rows[1][None]}})

    @pytest.mark.parametrize("names", [dict, of_ldm])
    def test_their_compressed_delta_is_a_lora(self, tmp_path, names):
        factors = compressed(whole_weights())
        inner = {"unet": factors, "modifier_token": {"<new1>": tensor(WIDTH)}}
        if names is of_ldm:
            inner = {"state_dict": of_ldm(factors) | {"embed": tensor(1, WIDTH)}}
        torch.save(inner, tmp_path / "delta.bin")
        opened = open_adapter(tmp_path / "delta.bin", [SPEC])
        assert not opened.notes
        assert opened.adapter.words.keys() == {"<new1>"}
        layers = opened.adapter.parts["unet"]
        assert {f"{layer}.weight" for layer in layers} == factors.keys()
        for layer, own in layers.items():
            assert own.is_lora
            expected = factors[f"{layer}.weight"]["u"] @ factors[f"{layer}.weight"]["v"]
            assert np.allclose(own.delta(np.zeros(expected.shape, np.float32)), expected, atol=1e-5)

    def test_layers_that_compression_left_nothing_of_are_as_they_were(self, tmp_path):
        factors = compressed(whole_weights())
        for name in list(factors)[1:]:
            factors[name] = {"u": factors[name]["u"][:, :0], "v": factors[name]["v"][:0]}
        torch.save({"unet": factors, "modifier_token": {}}, tmp_path / "delta.bin")
        assert len(open_adapter(tmp_path / "delta.bin", [SPEC]).adapter.updates) == 1

    def test_their_first_code_counts_words(self, tmp_path):
        weights, rows = whole_weights(), tensor(2, WIDTH)
        torch.save({"state_dict": of_ldm(weights) | {"embed": rows}}, tmp_path / "delta_epoch=000004.ckpt")
        adapter = open_adapter(tmp_path / "delta_epoch=000004.ckpt", [SPEC]).adapter
        assert_replaced(adapter, weights)
        assert_words(adapter, **{"<new1>": sd(rows[:1]), "<new2>": sd(rows[1:])})

    def test_the_difference_to_the_base_is_what_it_adds(self, tmp_path):
        weights = whole_weights(ALL_FOUR)
        save_file(of_diffusers(weights), tmp_path / "x.safetensors")
        for layer, own in open_adapter(tmp_path / "x.safetensors", [SPEC]).adapter.parts["unet"].items():
            for parameter in own.parameters:
                base = np.ones_like(weights[f"{layer}.{parameter}"].numpy())
                assert np.array_equal(own.delta(base, parameter), weights[f"{layer}.{parameter}"].numpy() - base)


class TestEmbeddings:
    @pytest.mark.parametrize(
        ("name", "content", "word"),
        [
            ("learned_embeds.bin", {"<cat-toy>": tensor(WIDTH)}, "<cat-toy>"),
            ("learned_embeds.safetensors", {"cat-toy": tensor(3, WIDTH)}, "cat-toy"),
            ("dog.pt", {"string_to_token": {"*": 265}, "string_to_param": {"*": tensor(2, WIDTH)}, "name": "x"}, "dog"),
            (
                "dog.pt",
                {"string_to_token": {"cat": torch.tensor(2)}, "string_to_param": {"cat": tensor(2, WIDTH)}},
                "cat",
            ),
            ("my.dog.safetensors", {"emb_params": tensor(2, WIDTH)}, "my.dog"),
            ("dog.safetensors", {"clip_l": tensor(2, WIDTH)}, "dog"),
            ("dog.bin", {"*": tensor(2, WIDTH)}, "dog"),
            ("half.safetensors", {"<dog>": tensor(2, WIDTH).to(torch.bfloat16)}, "<dog>"),
        ],
    )
    def test_the_word_is_the_name_or_the_files(self, tmp_path, name, content, word):
        (save_file if name.endswith("safetensors") else torch.save)(content, tmp_path / name)
        opened = open_adapter(tmp_path / name, [SPEC])
        assert opened.form is OtherFormat.EMBEDDING
        assert not opened.adapter.parts
        rows = content.get("string_to_param", content)
        assert_words(opened.adapter, **{word: sd(next(iter(rows.values())).float())})

    def test_of_sdxl_each_text_encoder_has_its_own(self, tmp_path):
        rows = {"clip_g": tensor(2, WIDTHS[1]), "clip_l": tensor(2, WIDTHS[0])}
        save_file(rows, tmp_path / "dog.safetensors")
        adapter = open_adapter(tmp_path / "dog.safetensors", [SPEC, XL]).adapter
        assert_words(adapter, dog={"text_encoder": rows["clip_l"], "text_encoder_2": rows["clip_g"]})

    def test_those_of_two_scripts_files_for_sdxl_belong_together(self, tmp_path):
        for name, width in zip(("learned_embeds", "learned_embeds_2"), WIDTHS, strict=True):
            save_file({"<dog>": tensor(width)}, tmp_path / f"{name}.safetensors")
        adapter = open_adapter(tmp_path, [XL]).adapter
        assert [rows.shape for rows in adapter.words["<dog>"].values()] == [(1, width) for width in WIDTHS]

    def test_beside_a_lora_they_come_along(self, tmp_path):
        lora, _ = write_lora_file_in(tmp_path / "run")
        save_file({"<dog>": tensor(WIDTH)}, lora.parent / "<dog>.safetensors")
        opened = open_adapter(lora.parent, [SPEC])
        assert opened.kind == "a LoRA"
        assert opened.adapter.words.keys() == {"<dog>"}
        assert opened.with_alpha(3.0).adapter.words.keys() == {"<dog>"}

    @pytest.mark.parametrize("model", [SD_15, SD_21])
    def test_the_family_is_told_by_the_width(self, tmp_path, model):
        save_file({"<dog>": tensor(model.text_encoder.transformer.hidden_size)}, tmp_path / "x.safetensors")
        assert open_adapter(tmp_path / "x.safetensors").families == model.family.value


def write_lora_file_in(folder):
    folder.mkdir()
    return write_lora_file(LoraFormat.KOHYA, folder / "lora")


class TestInspect:
    def test_it_names_layers_and_words(self, tmp_path, capsys):
        weights = whole_weights(ALL_FOUR, SD_15)
        weights = {name: value.to(torch.float16) for name, value in weights.items()}
        torch.save({"unet": weights, "modifier_token": {"<new1>": tensor(768)}}, tmp_path / "delta.bin")
        assert main(["inspect", str(tmp_path / "delta.bin")]) == 0
        said = capsys.readouterr().out
        assert "format: Custom Diffusion file, PyTorch" in said
        assert "family: SD 1.x\n" in said
        count = sum(value.numel() for value in weights.values())
        assert count == 43_962_560
        own = "to_q, to_k, to_v, to_out.0"
        assert f"unet: {count:,} parameters in 64 layers in place of the model's own: {own} of cross-attention" in said
        assert "word <new1>: 1 vector for text_encoder" in said

    def test_it_names_an_embedding(self, tmp_path, capsys):
        save_file({"clip_l": tensor(2, 768), "clip_g": tensor(2, 1280)}, tmp_path / "dog.safetensors")
        assert main(["inspect", str(tmp_path / "dog.safetensors")]) == 0
        said = capsys.readouterr().out
        assert "format: textual inversion embedding, safetensors" in said
        assert f"family: {SDXL_BASE.family.value}\n" in said
        assert "word dog: 2 vectors for text_encoder, 2 vectors for text_encoder_2" in said


def first_with(weights, change):
    name = next(iter(weights))
    return weights | {name: change(weights[name])}


NAN = tensor(WIDTH)
NAN[3] = float("nan")
MORE = {"conv_in.weight": tensor(2)}
BAD = {
    "another family": (of_diffusers(whole_weights(spec=SMALL["sd21"])), r"8 of another shape|32 of another shape"),
    "published family": (
        of_diffusers({n: v.to(torch.float16) for n, v in whole_weights(spec=SD_21).items()}),
        r"this is a Custom Diffusion file for SD 2\.x; expected one for SD 1\.x",
    ),
    "a level more": (
        {n.replace("down_blocks.0", "down_blocks.9"): v for n, v in of_diffusers(whole_weights()).items()},
        r"does not fit a Custom Diffusion file of SD 1\.x for .*: 4 unexpected \(down_blocks\.9",
    ),
    "a bias of keys": (
        of_diffusers(whole_weights() | {"mid_block.attentions.0.transformer_blocks.0.attn2.to_k.bias": tensor(40)}),
        r"1 unexpected \(mid_block\.attentions.*\.attn2\.processor\.to_k_custom_diffusion\.bias",
    ),
    "NaN in a weight": (
        of_diffusers(first_with(whole_weights(), lambda value: value / 0)),
        r"NaN or infinity in 1 of its tensors",
    ),
    "whole numbers": (
        of_diffusers(first_with(whole_weights(), lambda value: value.to(torch.int32))),
        r"holds I32, not numbers",
    ),
    "half of it something else": (of_diffusers(whole_weights()) | MORE, r"expected a LoRA"),
    "nothing": ({}, r"this is of an unknown kind \(it holds nothing\); expected a LoRA"),
    "NaN in a word": ({"<new1>": NAN}, r"NaN or infinity in 1 of its tensors \(<new1>\.text_encoder\)"),
    "an embedding of another family": (
        {"<new1>": tensor(1024)},
        r"the vectors of <new1> are 1 of width 1024, for SD 2\.x; expected as many of width 24 \(SD 1\.x\)$",
    ),
    "an embedding of SDXL": (
        {"clip_l": tensor(1, 768), "clip_g": tensor(1, 1280)},
        r"the vectors of bad are 1 of width 768 and 1 of width 1280, for SDXL base; expected as many of width 24",
    ),
    "an embedding of nobody": ({"<new1>": tensor(7)}, r"<new1> are 1 of width 7; expected as many of width 24 \(SD"),
    "an embedding in three dimensions": (
        {"<new1>": tensor(1, 2, WIDTH)},
        r"<new1> is F32 of shape \(1, 2, 24\), no vectors of a word: \(width,\) or \(tokens, width\)",
    ),
    "an embedding of whole numbers": ({"<new1>": torch.ones(WIDTH, dtype=torch.int64)}, r"<new1> is I64 of shape"),
    "an embedding without vectors": ({"<new1>": tensor(0, WIDTH)}, r"<new1> is F32 of shape \(0, 24\)"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_wrong_is_said(tmp_path, kind):
    content, expected = BAD[kind]
    path = tmp_path / "bad.safetensors"
    save_file({name: value.contiguous() for name, value in content.items()}, path)
    with pytest.raises(WeightError, match=expected) as error:
        open_adapter(path, [SD_15 if kind == "published family" else SPEC], "base")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_different_numbers_of_vectors_for_the_encoders_of_sdxl(tmp_path):
    save_file({"clip_l": tensor(1, WIDTHS[0]), "clip_g": tensor(2, WIDTHS[1])}, tmp_path / "dog.safetensors")
    expected = (
        r"the vectors of dog are 1 of width 24 and 2 of width 40; expected as many of width 24 and 40 \(SDXL base\)"
    )
    with pytest.raises(WeightError, match=expected):
        open_adapter(tmp_path / "dog.safetensors", [XL])


def test_a_file_that_changes_nothing_is_refused(tmp_path):
    empty = {name: {"u": own["u"][:, :0], "v": own["v"][:0]} for name, own in compressed(whole_weights()).items()}
    torch.save({"unet": empty, "modifier_token": {}}, tmp_path / "b.bin")
    with pytest.raises(WeightError, match=r"b\.bin: this is a Custom Diffusion file that changes nothing of a model"):
        open_adapter(tmp_path / "b.bin", [SPEC])


def test_a_pickle_of_processors_without_weights_holds_nothing(tmp_path):
    torch.save({"mid_block.attentions.0.transformer_blocks.0.attn1.processor": {}}, tmp_path / f"{WEIGHTS}.bin")
    with pytest.raises(WeightError, match=rf"{WEIGHTS}\.bin: .*it holds no tensors by name"):
        open_adapter(tmp_path, [SPEC])


@pytest.mark.parametrize("kind", ["a Custom Diffusion file", "a textual inversion embedding"])
def test_where_a_model_is_expected_it_is_called_what_it_is(tmp_path, kind):
    content = of_diffusers(whole_weights()) if "Diffusion" in kind else {"<new1>": tensor(768)}
    save_file(content, tmp_path / "x.safetensors")
    with pytest.raises(WeightError, match=f"this is {kind}; expected a model"):
        open_model(tmp_path / "x.safetensors")


class TestOfSeveral:
    """What a sampling is given together."""

    BASE = SimpleNamespace(
        opened=lambda: SimpleNamespace(spec=SPEC), path="base", schedule=Schedule(Path("base"), {"_class_name": "DDIM"})
    )

    def test_words_of_all_files_are_read_and_only_adapters_have_a_strength(self, tmp_path):
        lora, _ = write_lora_file_in(tmp_path / "run")
        save_file({"<dog>": tensor(WIDTH)}, lora.parent / "<dog>.safetensors")
        save_file({"emb_params": tensor(2, WIDTH)}, tmp_path / "cat.safetensors")
        adapters = ModelAdapters(self.BASE, [lora.parent], [tmp_path / "cat.safetensors"])
        assert {word: len(rows["text_encoder"]) for word, rows in adapters.words.items()} == {"<dog>": 1, "cat": 2}
        assert len(adapters.opened) == 1
        assert adapters.scales(SampleRequest(prompts=("",), lora_scales=(0.5,))) == (0.5,)

    def test_a_word_with_two_meanings_is_refused_and_the_same_twice_is_not(self, tmp_path):
        for name, seed in (("a", 0), ("b", 1), ("c", 0)):
            save_file({"<dog>": tensor(WIDTH, seed=seed)}, tmp_path / f"{name}.safetensors")
        a, b, c = (tmp_path / f"{name}.safetensors" for name in "abc")
        assert list(ModelAdapters(self.BASE, [], [a, c]).words) == ["<dog>"]
        with pytest.raises(WeightError, match=rf"^{b}: <dog> has other vectors here than in a file before it; leave"):
            ModelAdapters(self.BASE, [], [a, b])

    def test_layers_are_no_embedding(self, tmp_path):
        lora, _ = write_lora_file_in(tmp_path / "run")
        with pytest.raises(WeightError, match=rf"^--embedding {lora}: changes layers, too; name it with --lora$"):
            ModelAdapters(self.BASE, [], [lora])

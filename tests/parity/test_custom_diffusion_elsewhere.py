"""What Custom Diffusion's training writes, and what is made of it, in diffusers: each file draws the same there.

The standard is the model with the weights put in place by hand, in PyTorch.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from mindspore import Tensor
from safetensors.torch import load_file

from dreambooth_ms.adapters.adapter import Adapter
from dreambooth_ms.adapters.cross_attention import CROSS_ATTENTION
from dreambooth_ms.adapters.formulas import Update
from dreambooth_ms.adapters.word_files import write_words
from dreambooth_ms.adapters.writing import write_replacements
from dreambooth_ms.cli.main import main
from dreambooth_ms.data.conditioning import PromptTokenizer
from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.weights.bundle import open_bundle
from dreambooth_ms.weights.opened_model import open_model
from tests.parity.reference import normal, relative_error
from tests.tiny_model import write_random_model, write_random_sdxl

WORDS = ("<new1>", "<new2>")
PROMPT = "a photo of <new1> star, x<new2>y"
TOLERANCE = 1e-3
KINDS = {"sd": StableDiffusionPipeline, "xl": StableDiffusionXLPipeline}
CUSTOM_DIFFUSION = "pytorch_custom_diffusion_weights"


def trained(base, which):
    """What a training might have made of the cross-attention of a model, and two words of it."""
    model, updates = open_model(base), {}
    tensors = {name.rpartition("."): tensor.read() for name, tensor in model.of_part("unet").items()}
    for (layer, _, parameter), value in tensors.items():
        if layer.endswith(CROSS_ATTENTION[which]):
            noise = np.float32(0.3) * normal(*value.shape, seed=len(updates)) * np.abs(value).max(initial=0.1)
            updates.setdefault(layer, {})[parameter] = value + noise
    parts = [part for part in model.parts if part.startswith("text")]
    widths = {part: getattr(model.spec, part).transformer.hidden_size for part in parts}
    words = {
        word: {part: normal(1, width, seed=n) / 8 for part, width in widths.items()} for n, word in enumerate(WORDS, 5)
    }
    return Adapter({"unet": {name: Update(own) for name, own in updates.items()}}, words)


@pytest.fixture(scope="module", params=["sd crossattn_kv", "sd crossattn", "xl crossattn_kv"])
def run(request, tmp_path_factory):
    family, which = request.param.split()
    home = tmp_path_factory.mktemp(family)
    base = (write_random_sdxl if family == "xl" else write_random_model)(home / "base", levels=1)
    adapter = trained(base, which)
    for suffix in (".safetensors", ".bin"):
        write_replacements(adapter.parts["unet"], home / "run" / (CUSTOM_DIFFUSION + suffix), DType.F32, {"a": "b"})
        write_words(adapter.words, home / "run", DType.F32, {"a": "b"}, suffix)
    xl = {"add_watermarker": False} if family == "xl" else {}
    return SimpleNamespace(
        base=base,
        folder=home / "run",
        adapter=adapter,
        which=which,
        family=family,
        pipeline=lambda folder=base: KINDS[family].from_pretrained(folder, **xl),
    )


def with_replacements(run):
    """The base's pipeline with the weights in place by hand."""
    pipeline, state = run.pipeline(), {}
    for layer, own in run.adapter.parts["unet"].items():
        state |= {f"{layer}.{name}": torch.from_numpy(value) for name, value in own.tensors().items()}
    assert not pipeline.unet.load_state_dict(state, strict=False).unexpected_keys
    return pipeline


def with_words(run, pipeline):
    """A pipeline whose tables have the words' rows by hand."""
    for part in run.adapter.words[WORDS[0]]:
        tokenizer, encoder = getattr(pipeline, part.replace("text_encoder", "tokenizer")), getattr(pipeline, part)
        tokenizer.add_tokens(list(WORDS))
        encoder.resize_token_embeddings(len(tokenizer))
        rows = np.concatenate([run.adapter.words[word][part] for word in WORDS])
        encoder.get_input_embeddings().weight.data[-2:] = torch.from_numpy(rows)
    return pipeline


def noise(pipeline):
    """What the denoiser predicts for some latents and some text."""
    config, more = pipeline.unet.config, {}
    if config.addition_embed_type:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        sizes = torch.tensor([[32.0, 32, 0, 0, 32, 32]])
        more["added_cond_kwargs"] = {"text_embeds": torch.from_numpy(normal(1, pooled)), "time_ids": sizes}
    text = torch.from_numpy(normal(1, 77, config.cross_attention_dim))
    with torch.no_grad():
        return pipeline.unet(torch.from_numpy(normal(1, 4, 16, 16)), 500, text, **more).sample


def states(pipeline, prompt=PROMPT):
    """What the denoiser reads of a prompt."""
    with torch.no_grad():
        found = pipeline.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    return [one for one in found if one is not None]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < TOLERANCE


class TestFilesOfARun:
    def test_the_standard_differs_from_the_base(self, run):
        assert relative_error(noise(run.pipeline()), noise(with_replacements(run))) > 0.01

    def test_load_state_dict_after_the_documented_renaming(self, run):
        pipeline = run.pipeline()
        state = {
            name.replace(".processor.", ".").replace("_custom_diffusion", ""): value
            for name, value in load_file(run.folder / f"{CUSTOM_DIFFUSION}.safetensors").items()
        }
        assert not pipeline.unet.load_state_dict(state, strict=False).unexpected_keys
        assert relative_error(noise(pipeline), noise(with_replacements(run))) == 0

    def test_load_attn_procs_of_the_bin(self, run):
        pipeline = run.pipeline()
        pipeline.unet.load_attn_procs(run.folder, weight_name=f"{CUSTOM_DIFFUSION}.bin", _pipeline=pipeline)
        assert any("CustomDiffusion" in type(one).__name__ for one in pipeline.unet.attn_processors.values())
        assert relative_error(noise(pipeline), noise(with_replacements(run))) < TOLERANCE

    @pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
    def test_load_textual_inversion(self, run, suffix):
        pipeline = run.pipeline()
        for word in WORDS:
            if run.family == "sd":
                pipeline.load_textual_inversion(run.folder, weight_name=f"{word}{suffix}")
                continue
            file = run.folder / f"{word}{suffix}"
            held = load_file(file) if suffix == ".safetensors" else torch.load(file, weights_only=True)
            for name, of in (("clip_l", ""), ("clip_g", "_2")):
                towers = {key: getattr(pipeline, key + of) for key in ("text_encoder", "tokenizer")}
                pipeline.load_textual_inversion(held[name], token=word, **towers)
        assert_same(states(pipeline), states(with_words(run, run.pipeline())))


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_the_low_rank_form(run, form, tmp_path, capsys):
    target = tmp_path / "lora"
    more = ["--format", form, "--base", str(run.base), "--rank", "64"]
    target = tmp_path / ("lora.safetensors" if form == "kohya" else "lora")
    status = main(["convert", str(run.folder), str(target), *more])
    said = capsys.readouterr().err
    if run.which == "crossattn":
        assert status == 2
        assert "a LoRA has no place for its biases (of 4 layers); `merge` makes it part of a model, with --lora" in said
        assert not list(tmp_path.iterdir())
        return
    assert status == 0, said
    assert "As a LoRA it has rank 16: 0.00% of the squared norm of what was trained is lost." in said
    pipeline = run.pipeline()
    pipeline.load_lora_weights(target)
    assert relative_error(noise(pipeline), noise(with_replacements(run))) < TOLERANCE
    words = target if target.is_dir() else tmp_path
    assert load_file(words / "<new1>.safetensors").keys() == (
        {"<new1>"} if run.family == "sd" else {"clip_l", "clip_g"}
    )


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """The model that it is merged into."""
    target = tmp_path_factory.mktemp("merged") / "model"
    assert main(["merge", "--base", str(run.base), "--lora", str(run.folder), "--target", str(target)]) == 0
    return target


class TestMergedFolder:
    def test_from_pretrained(self, run, folder):
        pipeline, expected = run.pipeline(folder), with_words(run, with_replacements(run))
        assert relative_error(noise(pipeline), noise(expected)) < TOLERANCE
        assert_same(states(pipeline), states(expected))
        here = open_model(folder).of_part("unet")
        for layer, own in run.adapter.parts["unet"].items():
            assert_same([here[f"{layer}.{name}"].read() for name in own.tensors()], own.tensors().values())

    def test_here_the_text_states_are_those_of_the_words_beside_the_base(self, run, folder):
        merged, beside = open_bundle(folder), open_bundle(run.base).with_words(run.adapter.words)
        expected = states(run.pipeline(folder))
        for bundle in (merged, beside):
            (text,) = PromptTokenizer(bundle.text).texts([PROMPT]).values()
            found = bundle.load_text_encoders()(*(Tensor(one[None]) for one in text[0] if one.size))
            assert_same([value.asnumpy() for value in found], expected)

    def test_it_goes_on_to_be_converted_and_merged(self, run, folder, tmp_path, capsys):
        assert main(["convert", str(folder), str(tmp_path / "half"), "--dtype", "fp16"]) == 0
        again = run.pipeline(tmp_path / "half")
        assert len(again.tokenizer) == again.text_encoder.get_input_embeddings().weight.shape[0]
        more = ["--base", str(folder), "--lora", str(run.folder), "--target", str(tmp_path / "twice")]
        assert main(["merge", *more]) == 2
        assert "<new1>, <new2>: the tokenizer has this word already; rename the new one" in capsys.readouterr().err

"""Custom Diffusion's weights and new words in other forms: as a LoRA, as files again, in a model's folder."""

import json
import shutil

import numpy as np
import pytest

from dreambooth_ms.adapters.adapter import Adapter
from dreambooth_ms.adapters.file import open_adapter
from dreambooth_ms.adapters.formulas import Update
from dreambooth_ms.adapters.low_rank import as_lora
from dreambooth_ms.adapters.word_files import write_words
from dreambooth_ms.adapters.writing import write_replacements
from dreambooth_ms.cli.main import main
from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.clip_tokenizer import ClipTokenizer
from dreambooth_ms.formats.files.dtypes import DType
from dreambooth_ms.formats.files.open import open_tensor_file
from dreambooth_ms.weights.bundle import open_bundle
from dreambooth_ms.weights.opened_model import open_model
from tests.tiny_model import write_random_model

TABLE = "text_encoder.text_model.embeddings.token_embedding.weight"
CUSTOM_DIFFUSION = "pytorch_custom_diffusion_weights.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("base") / "model", levels=1)


def changed(base, ends=("attn2.to_k", "attn2.to_v"), with_bias=False):
    rng, updates = np.random.default_rng(0), {}
    for name, tensor in open_model(base).of_part("unet").items():
        layer, _, parameter = name.rpartition(".")
        if layer.endswith(ends) and (parameter == "weight" or with_bias):
            value = tensor.read()
            noise = rng.standard_normal(value.shape, dtype=np.float32) / 10
            updates.setdefault(layer, {})[parameter] = value + noise
    return {layer: Update(own) for layer, own in updates.items()}


def words_of(counts):
    rng = np.random.default_rng(1)
    return {
        word: {"text_encoder": rng.standard_normal((count, 24), dtype=np.float32)} for word, count in counts.items()
    }


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    write_replacements(changed(base), folder / CUSTOM_DIFFUSION, DType.F32, {"author": "me"})
    write_words(words_of({"<new1>": 1, "<new2>": 2}), folder, DType.F32, {})
    return folder


def failing(capsys, *arguments):
    """The message of a command that must fail."""
    assert main([str(one) for one in arguments]) == 2
    return capsys.readouterr().err


class TestLowRank:
    def test_singular_values_are_kept_as_the_paper_keeps_them(self):
        """The first at which the running sum exceeds 60 % of the total, that one excluded; or else the first."""
        for values, rank in (([5, 3, 1, 1], 1), ([4, 3, 2, 1], 1), ([3, 3, 3, 3], 2), ([9, 1], 1)):
            rng = np.random.default_rng(0)
            left, right = (np.linalg.qr(rng.standard_normal((6, len(values))))[0] for _ in range(2))
            delta = (left * values @ right.T).astype(np.float32)
            adapter = Adapter({"unet": {"a": Update({"weight": delta})}})
            lora, (note,) = as_lora(adapter, lambda layer: np.zeros((6, 6), np.float32), None, "x")
            own = lora.parts["unet"]["a"]
            assert own.rank == rank, values
            best = left[:, :rank] * values[:rank] @ right[:, :rank].T
            if len({*values}) == len(values):
                assert np.abs(own.delta(delta) - best).max() < 1e-5
            lost = sum(value**2 for value in values[rank:]) / sum(value**2 for value in values)
            assert f"{lost:.2%} of the squared norm" in note

    def test_what_did_not_change_is_a_lora_of_zeros(self):
        weight = np.ones((4, 3), np.float32)
        lora, (note,) = as_lora(Adapter({"unet": {"a": Update({"weight": weight})}}), lambda layer: weight, None, "x")
        assert not lora.parts["unet"]["a"].delta(weight).any()
        assert note == "As a LoRA it has rank 1: 0.00% of the squared norm of what was trained is lost."

    def test_of_full_rank_it_is_the_difference(self, base, run, tmp_path, capsys):
        more = ("--format", "kohya", "--base", str(base), "--rank", "99")
        assert main(["convert", str(run), str(tmp_path / "lora.safetensors"), *more]) == 0
        assert "As a LoRA it has rank 16: 0.00%" in capsys.readouterr().err
        found, tensors = open_adapter(tmp_path / "lora.safetensors", [open_model(base).spec]), open_model(base).tensors
        for layer, own in changed(base).items():
            value = tensors[f"unet.{layer}.weight"].read()
            assert np.abs(found.adapter.parts["unet"][layer].delta(value) - own.delta(value)).max() < 1e-6
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            *("<new1>.safetensors", "<new2>.safetensors", "lora.safetensors")
        ]

    def test_another_size_is_told(self):
        adapter = Adapter({"unet": {"a": Update({"weight": np.ones((4, 3), np.float32)})}})
        with pytest.raises(WeightError, match=r"does not fit the base: \(4, 3\) for \(4, 4\)"):
            as_lora(adapter, lambda layer: np.ones((4, 4), np.float32), None, "x")


class TestFilesAgain:
    def test_a_bin_becomes_safetensors_with_its_words(self, base, run, tmp_path):
        write_replacements(changed(base), tmp_path / "in/a.bin", DType.F32, {})
        assert main(["convert", str(tmp_path / "in/a.bin"), str(tmp_path / CUSTOM_DIFFUSION), "--base", str(base)]) == 0
        found, own = open_tensor_file(tmp_path / CUSTOM_DIFFUSION), open_tensor_file(run / CUSTOM_DIFFUSION)
        assert found.tensors.keys() == own.tensors.keys()
        assert all(np.array_equal(found.tensors[name].read(), own.tensors[name].read()) for name in own.tensors)

    def test_a_folder_becomes_a_folder(self, base, run, tmp_path):
        more = ("--format", "custom_diffusion", "--base", str(base), "--dtype", "fp16")
        assert main(["convert", str(run), str(tmp_path / "half"), *more]) == 0
        assert sorted(path.name for path in (tmp_path / "half").iterdir()) == sorted(
            path.name for path in run.iterdir()
        )
        assert open_tensor_file(tmp_path / "half" / CUSTOM_DIFFUSION).metadata["author"] == "me"
        assert {one.dtype for one in open_tensor_file(tmp_path / "half" / CUSTOM_DIFFUSION).tensors.values()} == {
            DType.F16
        }

    def test_a_word_alone(self, base, run, tmp_path):
        assert main(["convert", str(run / "<new2>.safetensors"), str(tmp_path / "out"), "--base", str(base)]) == 0
        file = tmp_path / "out" / "<new2>.safetensors"
        assert {name: one.shape for name, one in open_tensor_file(file).tensors.items()} == {"<new2>": (2, 24)}


class TestMerging:
    def merge(self, base, target, *loras):
        return main(["merge", "--base", str(base), "--target", str(target), "--lora", *map(str, loras)])

    def test_rows_and_tokens_follow_those_of_the_base(self, base, run, tmp_path, capsys):
        assert self.merge(base, tmp_path / "out", run) == 0
        size, end = ClipTokenizer(base / "tokenizer").first_and_end
        assert json.loads((tmp_path / "out/tokenizer/added_tokens.json").read_text()) == {
            "<new1>": size, "<new2>": size + 1, "<new2>_1": size + 2,
        }  # fmt: skip
        config = json.loads((tmp_path / "out/text_encoder/config.json").read_text())
        assert (config["vocab_size"], config["eos_token_id"]) == (size + 3, end)
        table, old = (open_model(folder).tensors[TABLE].read() for folder in (tmp_path / "out", base))
        words = words_of({"<new1>": 1, "<new2>": 2})
        assert np.array_equal(table, np.concatenate([old, *(own["text_encoder"] for own in words.values())]))

    def test_the_folder_reads_as_the_base_with_the_words_beside_it(self, base, run, tmp_path):
        assert self.merge(base, tmp_path / "out", run) == 0
        beside = open_bundle(base).with_words(words_of({"<new1>": 1, "<new2>": 2})).text[0].tokenizer()
        merged = open_bundle(tmp_path / "out").text[0].tokenizer()
        for prompt in ("a <new2> star <new1>", "x<new1>y, <new2>s", "a <NEW1>", "a photo"):
            assert merged.tokens(prompt) == beside.tokens(prompt), prompt

    def test_an_old_end_token_is_corrected(self, base, run, tmp_path):
        shutil.copytree(base, tmp_path / "old")
        config = json.loads((tmp_path / "old/text_encoder/config.json").read_text())
        (tmp_path / "old/text_encoder/config.json").write_text(json.dumps(config | {"eos_token_id": 2}))
        assert self.merge(tmp_path / "old", tmp_path / "out", run) == 0
        merged = json.loads((tmp_path / "out/text_encoder/config.json").read_text())
        assert merged["eos_token_id"] == config["eos_token_id"]


class TestBadInputs:
    def test_biases_have_no_place_in_a_lora(self, base, tmp_path, capsys):
        updates = changed(base, ("attn2.to_k", "attn2.to_v", "attn2.to_out.0"), with_bias=True)
        write_replacements(updates, tmp_path / "a.safetensors", DType.F32, {})
        said = failing(
            capsys, "convert", tmp_path / "a.safetensors", tmp_path / "out", "--format", "diffusers", "--base", base
        )
        assert "a LoRA has no place for its biases (of 4 layers); `merge` makes it part of a model, with --lora" in said
        assert not (tmp_path / "out").exists()

    def test_without_a_base_there_is_no_difference(self, run, tmp_path, capsys):
        said = failing(capsys, "convert", run, tmp_path / "out", "--format", "diffusers")
        assert "--base" in said
        assert not (tmp_path / "out").exists()

    def test_a_lora_is_no_custom_diffusion_file(self, base, run, tmp_path, capsys):
        assert main(["convert", str(run), str(tmp_path / "l"), "--format", "diffusers", "--base", str(base)]) == 0
        capsys.readouterr()
        more = ("--base", base, "--format", "custom_diffusion")
        assert "holds no whole weights, as Custom Diffusion's files do; choose another --format" in failing(
            capsys, "convert", tmp_path / "l", tmp_path / "out", *more
        )
        assert "--rank is for what becomes a LoRA; leave it out" in failing(
            capsys, "convert", run, tmp_path / "out", *more, "--rank", "2"
        )
        assert not (tmp_path / "out").exists()

    def test_layers_are_no_embedding_and_words_no_lora(self, base, run, tmp_path, capsys):
        more = "changes layers, too, which an embedding cannot; choose another --format"
        alone = "holds words alone; write them with --format embedding"
        for source, form, why in ((run, "embedding", more), (run / "<new1>.safetensors", "diffusers", alone)):
            said = failing(capsys, "convert", source, tmp_path / "out", "--base", base, "--format", form)
            assert why in said

    def test_a_word_is_a_file_in_a_folder(self, base, run, tmp_path, capsys):
        """Its name is the word, which some programs read nowhere else."""
        said = failing(capsys, "convert", run / "<new1>.safetensors", tmp_path / "x.safetensors", "--base", base)
        assert "--format embedding is written to a folder; name one" in said

    def test_a_file_of_a_word_is_not_replaced(self, base, run, tmp_path, capsys):
        (tmp_path / "<new1>.safetensors").touch()
        target = tmp_path / "x.safetensors"
        said = failing(capsys, "convert", run, target, "--base", base, "--format", "custom_diffusion")
        assert "<new1>.safetensors: is there already; remove it, or choose another folder" in said
        assert not target.exists()

    def test_a_single_file_has_no_place_for_words(self, base, run, tmp_path, capsys):
        for target in ("x.safetensors", "x.ckpt"):
            said = failing(capsys, "merge", "--base", base, "--lora", run, "--target", tmp_path / target)
            assert "a single file has no place for new words (<new1>, <new2>); name a folder" in said
        assert not list(tmp_path.iterdir())

    def test_a_word_twice(self, base, run, tmp_path, capsys):
        write_words({"<new1>": words_of({"a": 1, "b": 1})["b"]}, tmp_path / "other", DType.F32, {})
        more = ("--lora", run, tmp_path / "other", "--target", tmp_path / "out")
        assert "<new1> has other vectors here than in a file before it" in failing(
            capsys, "merge", "--base", base, *more
        )

    def test_a_word_that_the_tokenizer_has(self, base, tmp_path, capsys):
        write_words(words_of({"<|endoftext|>": 1}), tmp_path / "words", DType.F32, {})
        said = failing(capsys, "merge", "--base", base, "--lora", tmp_path / "words", "--target", tmp_path / "out")
        assert "<|endoftext|>: the tokenizer has this word already; rename the new one" in said
        assert not (tmp_path / "out").exists()

    def test_a_word_that_is_no_name_of_a_file(self, tmp_path):
        with pytest.raises(WeightError, match=r"'a/b': no file can have the name of this word"):
            write_words(words_of({"a/b": 1}), tmp_path, DType.F32, {})

    def test_no_safe_serialization_of_a_lora(self, capsys):
        more = ("--pretrained_model_name_or_path", "a", "--instance_data_dir", "b", "--instance_prompt", "c")
        said = failing(capsys, "train", "--no_safe_serialization", *more)
        assert "--no_safe_serialization: LoRAs and models are safetensors; leave it out" in said

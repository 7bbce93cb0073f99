"""What a list of several subjects may hold, and what is said of everything else, before any work."""

import json
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreambooth_ms.cli.training_concepts import numbers_to_come, read_concepts, sources_of
from dreambooth_ms.cli.training_job import TrainingJob
from dreambooth_ms.config.load import load
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.data.captions import Wording
from dreambooth_ms.data.records import CLASS, INSTANCE
from dreambooth_ms.errors import ConfigError, DataError
from dreambooth_ms.processes.group import ALONE
from dreambooth_ms.training.content import changes, content_of

PRIOR = "--with_prior_preservation"
DOG = {"instance_prompt": "a sks dog", "instance_data_dir": "dog", "class_prompt": "a dog", "class_data_dir": "dogs"}
CAT = {"instance_prompt": "a zwx cat", "instance_data_dir": "cat", "class_prompt": "a cat", "class_data_dir": "cats"}
KOHYA = """
[general]
shuffle_caption = true
keep_tokens = 1
caption_extension = ".txt"
[[datasets]]
resolution = [512, 512]
batch_size = 4
enable_bucket = false
  [[datasets.subsets]]
  image_dir = "dog"
  num_repeats = 10
  class_tokens = "sks dog"
  color_aug = false
  [[datasets.subsets]]
  image_dir = "dogs"
  is_reg = true
  class_tokens = "dog"
  keep_tokens = 2
"""
SETS = """
data:
  concepts:
    - instance_set: {path: dog, prompt: sks dog, combine_prompt_from_txt: true, prompt_combine_template: "{PROMPT}, {TXT_PROMPT}"}
      class_set:
        path: dogs
        prompt: dog
        auto_generate: {enabled: true, negative_prompt: bad, steps: 28, cfg_scale: 11, num_target: 5, batch_size: 1}
    - instance_set: {path: cat, prompt: zwx cat}
      class_set: {path: cats, prompt: cat, combine_prompt_from_txt: true, auto_generate: {enabled: false}}
sampling: {interval_steps: 50}
"""  # noqa: E501 - as their guide has it


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def sources(place):
    """A list's text, its name and further flags -> where its concepts come from, and what was told."""

    def read(text, *flags, name="list.json"):
        if text:
            Path(name).write_text(text if isinstance(text, str) else json.dumps(text))
        said = []
        flags = ["--pretrained_model_name_or_path", "base", "--concepts_list", name, *flags]
        return sources_of(load(TrainConfig, flags, said.append), said.append), said

    return read


def fill(folder, count):
    Path(folder).mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng([len(folder), number]).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(Path(folder, f"{number}.png"))


def names(found):
    return [(one.concept.name, one.concept.group, str(one.folder), one.prompt) for one in found]


def test_every_subject_has_a_class_under_a_name_of_its_own(sources):
    found, said = sources([DOG, CAT | {"repeats": 2.5, "weight": 0.5, "class_negative_prompt": "dogs"}], PRIOR)
    assert names(found) == [
        ("instance", INSTANCE, "dog", "a sks dog"),
        ("instance_2", INSTANCE, "cat", "a zwx cat"),
        ("class", CLASS, "dogs", "a dog"),
        ("class_2", CLASS, "cats", "a cat"),
    ]
    assert (found[1].concept.repeats, found[1].concept.weight, found[0].concept.weight) == (Fraction("2.5"), 0.5, 1)
    assert [one.generated and one.generated.class_negative_prompt for one in found] == [None, None, "", "dogs"]
    assert not said


def test_one_subject_of_flags_is_a_list_of_one(place):
    flags = ["--instance_data_dir", "dog", "--instance_prompt", "a sks dog", "--class_data_dir", "dogs"]
    flags += [PRIOR, "--class_prompt", "a dog", "--prior_loss_weight", "0.5", "--caption_dropout", "0.1"]
    found = sources_of(load(TrainConfig, ["--pretrained_model_name_or_path", "base", *flags]))
    assert names(found) == [("instance", INSTANCE, "dog", "a sks dog"), ("class", CLASS, "dogs", "a dog")]
    assert [one.concept.wording for one in found] == [Wording(0.1), None]
    assert [one.concept.weight for one in found] == [1, 0.5]


def test_paths_are_relative_to_the_list_and_else_to_the_current_folder(sources, place):
    os.makedirs("lists/dog")
    os.makedirs("dogs")
    found, _ = sources([DOG], PRIOR, name="lists/list.json")
    assert [str(one.folder) for one in found] == ["lists/dog", "dogs"]
    (place / "dogs").rmdir()
    found, _ = sources([DOG | {"instance_data_dir": str(place / "cat")}], PRIOR, name="lists/list.json")
    assert [str(one.folder) for one in found] == [str(place / "cat"), "lists/dogs"]


def test_what_a_subject_says_is_its_own_and_the_rest_is_the_run_s(sources):
    own = {"caption_dropout": 0.5, "mask_dir": "masks", "read_prompt_from_txt": "instance"}
    found, said = sources([DOG | own, CAT], "--shuffle_caption", "--unmasked_weight", "0.1")
    assert [one.concept.wording for one in found] == [Wording(0.5, True), Wording(0, True)]
    assert [(one.masked, one.mask_folder, one.captioning.from_files) for one in found] == [
        (True, Path("masks"), True),
        (False, None, False),
    ]
    # Without prior preservation what is said of classes is not read.
    assert said == [
        f"list.json: concept {number}: {name} has no effect without --with_prior_preservation{or_else}"
        for number in (1, 2)
        for name, or_else in (
            ("class_data_dir", ""),
            ("class_prompt", " or --prior_preservation base_output"),
        )
    ]


def test_the_base_answers_for_the_class_of_each_subject(sources):
    """Rows of a class are the subject's under the class prompt: with the same pictures, folder and draws."""
    dog, cat = DOG | {"repeats": 2.5, "caption_dropout": 0.5}, CAT | {"prior_loss_weight": 0.5, "mask_dir": "masks"}
    found, said = sources([dog, cat], "--prior_preservation", "base_output")
    assert names(found) == [
        ("instance", INSTANCE, "dog", "a sks dog"),
        ("instance_2", INSTANCE, "cat", "a zwx cat"),
        ("class", CLASS, "dog", "a dog"),
        ("class_2", CLASS, "cat", "a cat"),
    ]
    assert [one.concept.drawn_as for one in found] == ["", "", "instance", "instance_2"]
    assert [one.concept.weight for one in found] == [1, 1, 1, 0.5]
    assert [(one.generated, one.count, one.masked, one.concept.wording) for one in found[2:]] == [
        (None, None, False, None)
    ] * 2
    assert not any("class_prompt" in line for line in said)


def test_how_the_class_is_preserved_is_the_run_s(sources):
    with pytest.raises(ConfigError, match="concept 1: prior_preservation 'base_l2' is not the run's None, which all"):
        sources([DOG | {"prior_preservation": "base_l2"}, CAT])
    nameless = {name: value for name, value in DOG.items() if name != "class_prompt"}
    with pytest.raises(ConfigError, match=r"concept 1: .*needs --class_prompt"):
        sources([nameless, CAT], "--prior_preservation", "base_output")


def test_sets_of_crosstyan_s_scripts(sources):
    found, _ = sources(SETS, PRIOR, name="list.yaml")
    assert names(found)[2:] == [("class", CLASS, "dogs", "dog"), ("class_2", CLASS, "cats", "cat")]
    generated, none = (one.generated for one in found[2:])
    assert none is None, "all pictures of the folder, and no others"
    assert (generated.class_negative_prompt, generated.infer_steps, generated.guidance_scale) == ("bad", 28, 11)
    assert (generated.num_class_images, generated.sample_batch_size) == (5, 1)
    templates = [(one.captioning.from_files, one.captioning.template) for one in found]
    assert templates[0] == (True, "{PROMPT}, {TXT_PROMPT}")
    assert templates[1:] == [(False, "{CAPTION}"), (False, "{CAPTION}"), (True, "{PROMPT} {CAPTION}")]


def test_a_dataset_config_of_kohya(sources):
    found, said = sources(KOHYA, PRIOR, "--prior_loss_weight", "0.3", name="list.toml")
    assert names(found) == [("instance", INSTANCE, "dog", "sks dog"), ("class", CLASS, "dogs", "dog")]
    assert [(one.concept.repeats, one.concept.weight) for one in found] == [(10, 1), (1, 0.3)]
    assert [one.concept.wording for one in found] == [Wording(0, True, 1), Wording(0, True, 2)]
    assert all(one.captioning.from_files and one.captioning.may_lack and not one.generated for one in found)
    assert not said


def test_folders_of_kohya_with_captions_where_there_are_some(sources, place):
    for folder, count in (("train/10_sks dog", 2), ("train/3_zwx_cat", 1), ("train/other", 1), ("reg/1_dog", 3)):
        fill(folder, count)
    Path("train/10_sks dog/1.txt").write_text("a sks dog asleep\nand so on")
    found, said = sources("", "--reg_data_dir", "reg", name="train")
    assert said == ["train: folders that are not named as 10_sks dog are left out: other"]
    assert names(found) == [
        ("instance", INSTANCE, "train/10_sks dog", "sks dog"),
        ("instance_2", INSTANCE, "train/3_zwx_cat", "zwx_cat"),
        ("class", CLASS, "reg/1_dog", "dog"),
    ]
    concepts = read_concepts(found, said.append)
    assert [one.captions for one in concepts[0].records] == [("sks dog",), ("a sks dog asleep", "and so on")]
    assert TrainingJob(ALONE, None, None, found, concepts).pictures == 2 * 10 + 3
    assert said[-3:] == [
        "instance: 2 pictures of train/10_sks dog, 'sks dog'",
        "instance_2: 1 picture of train/3_zwx_cat, 'zwx_cat'",
        "class: 3 pictures of reg/1_dog, 'dog'",
    ]


def test_a_class_is_shared_by_those_who_say_the_same_of_it(sources):
    fill("dog", 1)
    fill("cat", 2)
    fill("dogs", 1)
    shared = CAT | {"class_prompt": "a dog", "class_data_dir": "dogs", "repeats": 1.5}
    found, _ = sources([DOG, shared], PRIOR, "--num_class_images", "3")
    assert numbers_to_come(found) == {"dogs": [0, 1]}, "they are generated once"
    concepts = read_concepts(found, lambda line: None)
    assert [(one.name, len(one.records)) for one in concepts] == [
        ("instance", 1), ("instance_2", 2), ("class", 1), ("class_2", 1)
    ]  # fmt: skip
    assert TrainingJob(ALONE, None, None, found, concepts).pictures == 6


def test_what_changed_between_runs_is_told_by_concept(sources):
    fill("dog", 1)
    fill("cat", 2)

    def content(*entries):
        found, _ = sources(list(entries))
        return content_of({}, read_concepts(found, lambda line: None), found)

    before = content(DOG, CAT)
    assert changes(before, content(DOG, CAT)) == []
    changed = CAT | {"instance_prompt": "a pet", "weight": 2}
    assert changes(before, content(DOG, changed)) == ["concepts: prompt of instance_2, weight of instance_2 changed"]
    assert changes(before, content(DOG)) == [
        "concepts: prompt of instance_2, repeats of instance_2, weight of instance_2, wording of instance_2 removed",
        "instance_2: 0.png, 1.png removed",
    ]
    assert "instance_2: 0.png, 1.png added" in changes(content(DOG), before)
    os.remove("cat/1.png")
    assert changes(before, content(DOG, CAT)) == ["instance_2: 1.png removed"]


def test_a_prompt_may_be_left_out_where_captions_stand_in_its_place(place):
    base = ["--pretrained_model_name_or_path", "base", "--instance_data_dir", "dog"]
    for flags in (["--use_txt_as_label"], ["--use_filename_as_label"], ["--caption_column", "text"]):
        assert load(TrainConfig, [*base, *flags]).data.instance_prompt is None
    for flags in ([], ["--use_filename_as_label", "--read_prompt_from_txt", "both"]):
        with pytest.raises(ConfigError, match=r"^--instance_prompt: required$"):
            load(TrainConfig, [*base, *flags])


NO_LIST = "list.{}: expected a list of subjects as in docs/data.md, in JSON, YAML or kohya's TOML"
REFUSED = {
    "no file": ("", [], ["--concepts_list list.json: No such file or directory"]),
    "no JSON": (
        "[{},]", [],
        ["--concepts_list list.json: Expecting value: line 1 column 5 (char 4)"],
    ),
    "no list": ('{"a": 1}', [], [NO_LIST.format("json")]),
    "an empty one": ("[]", [], [NO_LIST.format("json")]),
    "no entries": ("[1]", [], [NO_LIST.format("json")]),
    "keys that mean nothing": (
        [DOG | {"foo": 1, "instance_pormpt": "x"}, CAT | {"rank_of": 3}], [PRIOR],
        [
            "list.json: concept 1: foo: unknown key",
            "list.json: concept 1: instance_pormpt: unknown key; did you mean instance_prompt?",
            "list.json: concept 2: rank_of: unknown key",
        ],
    ),
    "what is missing": (
        [DOG, {"instance_prompt": "a zwx cat"}], [PRIOR],
        [
            "list.json: concept 2: instance_data_dir: required",
            "list.json: concept 2: with_prior_preservation: needs --class_data_dir, the folder of the class pictures",
            "list.json: concept 2: with_prior_preservation: needs --class_prompt, the prompt of the class pictures",
        ],
    ),
    "values out of range": (
        [DOG | {"repeats": 0, "weight": -1, "num_class_images": "many"}], [PRIOR],
        [
            "list.json: concept 1: num_class_images: expected a whole number, got 'many'",
            "list.json: concept 1: repeats: expected greater than 0, got 0.0",
            "list.json: concept 1: weight: expected at least 0, got -1.0",
        ],
    ),
    "what all share": (
        [DOG | {"resolution": 768, "hflip": True}], [PRIOR],
        [
            "list.json: concept 1: resolution 768 is not the run's 512, which all share; give --resolution",
            "list.json: concept 1: random_flip True is not the run's False, which all share; give --random_flip",
        ],
    ),
    "flags of one subject": (
        [DOG], ["--instance_data_dir", "dog", "--class_prompt", "a dog"],
        [
            "--concepts_list: names them itself; leave out --instance_data_dir, --instance_prompt, --class_data_dir, "
            "--class_prompt, --dataset_name"
        ],
    ),
    "a class folder that is a subject's": (
        [DOG, CAT | {"class_data_dir": "dog"}], [PRIOR],
        ["dog: holds pictures of a class and others; give each a folder of its own"],
    ),
    "a class folder of two prompts": (
        [DOG, CAT | {"class_data_dir": "dogs"}], [PRIOR],
        ["dogs: holds pictures of a class and others; give each a folder of its own"],
    ),
    "its own class folder": (
        [DOG | {"class_data_dir": "dog"}], [PRIOR],
        [
            "list.json: concept 1: class_data_dir: expected another folder than --instance_data_dir, or class pictures "
            "would mix with those of the subject"
        ],
    ),
    "a class without prior preservation": (
        [DOG, {"instance_data_dir": "dogs", "instance_prompt": "a dog", "is_reg": True}], [],
        ["list.json: class pictures go with --with_prior_preservation; give both, or none of them"],
    ),
    "classes alone": (
        [{"instance_data_dir": "dogs", "instance_prompt": "a dog", "is_reg": True}], [],
        ["list.json: expected subjects, each with a class or none of them; or is_reg marks the classes"],
    ),
    "folders of classes beside a file": (
        [DOG], ["--reg_data_dir", "reg"],
        ["--reg_data_dir reg: goes with a folder of folders; classes stand in list.json"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_said_at_once(sources, case):
    text, flags, lines = REFUSED[case]
    with pytest.raises(ConfigError) as error:
        sources(text, *flags)
    assert str(error.value).splitlines() == lines


REFUSED_OF_KOHYA = {
    '[[datasets]]\nresolution = 512': NO_LIST.format("toml"),
    "[[datasets]": "--concepts_list list.toml: Expected ']]' at the end of an array declaration",
    KOHYA.replace(".txt", ".cap").replace("color_aug = false", 'caption_prefix = "x"'): (
        "list.toml: subset 1: caption_extension: captions are found as .txt and .caption\n"
        "list.toml: subset 1: caption_prefix: write it into the captions, or give --prompt_template\n"
        "list.toml: subset 2: caption_extension: captions are found as .txt and .caption"
    ),
    KOHYA.replace("enable_bucket = false", "enable_bucket = true"): (
        "list.toml: subset 1: use_aspect_ratio_bucket True is not the run's False, which all share; give "
        "--use_aspect_ratio_bucket\nlist.toml: subset 2: use_aspect"
    ),
    KOHYA.replace('image_dir = "dog"\n', ""): "list.toml: subset 1: instance_data_dir: required",
}  # fmt: skip


@pytest.mark.parametrize("text", REFUSED_OF_KOHYA)
def test_what_is_wrong_with_a_file_of_kohya(sources, text):
    with pytest.raises(ConfigError) as error:
        sources(text, PRIOR, name="list.toml")
    assert str(error.value).startswith(REFUSED_OF_KOHYA[text])


def test_what_is_wrong_with_folders_of_kohya(sources, place):
    fill("train/dog", 1)
    with pytest.raises(
        ConfigError, match=r"^train: no folder named as 10_sks dog in it; of one subject give --instance"
    ):
        sources("", name="train")
    fill("train/10_sks dog", 1)
    with pytest.raises(ConfigError, match=r"^reg: no folder named as 10_sks dog in it"):
        sources("", "--reg_data_dir", "reg", name="train")


def test_kohya_s_pictures_need_a_caption_or_tokens(sources):
    fill("dog", 1)
    found, _ = sources('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "dog"', name="list.toml")
    with pytest.raises(DataError, match=r"no caption, expected a text such as dog.txt beside dog.png, 1 found: 0.png"):
        read_concepts(found)


def test_photographs_of_a_class_have_their_own_captions_and_none_is_generated(sources):
    """Of one subject by lists, of the other beside the pictures; more than are asked for are left out."""
    for folder, count in (("dog", 1), ("cat", 1), ("dogs/images", 4), ("cats", 3)):
        fill(folder, count)
    Path("dogs/images.txt").write_text("".join(f"dogs/images/{n}.png\n" for n in range(4)))
    Path("dogs/caption.txt").write_text("".join(f"dog {n}\n" for n in range(4)))
    for number in range(3):
        Path(f"cats/{number}.txt").write_text(f"cat {number}")
    dog = {key: value for key, value in DOG.items() if key != "class_prompt"}
    found, _ = sources([dog, CAT], PRIOR, "--real_prior", "--num_class_images", "3")
    assert not numbers_to_come(found)
    *_, dogs, cats = read_concepts(found, lambda line: None)
    assert [record.captions for record in dogs.records] == [("dog 0",), ("dog 1",), ("dog 2",)]
    assert [record.captions for record in cats.records] == [("cat 0",), ("cat 1",), ("cat 2",)]


def test_one_subject_of_several_has_photographs_of_its_class(sources):
    for folder, count in (("dog", 1), ("cat", 1), ("dogs", 2)):
        fill(folder, count)
    for number in range(2):
        Path(f"dogs/{number}.txt").write_text("a dog of mine")
    found, _ = sources([DOG | {"real_prior": True, "num_class_images": 2}, CAT], PRIOR)
    assert {folder: len(own) for folder, own in numbers_to_come(found).items()} == {"cats": 100}
    assert read_concepts(found, lambda line: None)[-1].records[0].captions == ("a dog of mine",)

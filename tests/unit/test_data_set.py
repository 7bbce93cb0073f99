"""--dataset_name: folders and parquet files, here or on the hub, become a folder of pictures with their captions."""

import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from dreambooth_ms.config.load import load
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.data.captions import Captioning
from dreambooth_ms.data.data_set import with_folder_of_data_set
from dreambooth_ms.data.pictures import find_pictures
from dreambooth_ms.errors import ConfigError, DataError, UserError, WeightError
from tests.unit.test_hub import COMMIT, answered, hub  # noqa: F401  (a fixture)
from tools.tiny_base.world import write_subject


@pytest.fixture
def photographs(tmp_path):
    """Five, by name."""
    write_subject(tmp_path / "photographs")
    return {path.name: path.read_bytes() for path in sorted((tmp_path / "photographs").iterdir())}


def write_parquet(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def images(photographs, named=True):
    """As the Image feature of data sets is stored."""
    return [{"bytes": own, "path": name if named else None} for name, own in photographs.items()]


def find(source, output, columns=("image", "text"), config_name=None, cache=None):
    named = ("dataset_name", "output_dir", "image_column", "caption_column", "dataset_config_name", "cache_dir")
    columns = (*columns, None)[:2]
    values = zip(named, (source, output, *columns, config_name, cache), strict=True)
    flags = [part for name, value in values if value is not None for part in (f"--{name}", str(value))]
    config = load(TrainConfig, ["--pretrained_model_name_or_path", "base", "--instance_prompt", "a star", *flags])
    return Path(with_folder_of_data_set(config).data.instance_data_dir)


def prompts(folder, column="text"):
    """Of each picture, its bytes and its prompts."""
    pictures = find_pictures(folder)[0]
    found = Captioning(from_files=True, column=column).prompts(pictures, "")
    return [(path.read_bytes(), own) for path, own in zip(pictures, found, strict=True)]


@pytest.mark.parametrize("named", [True, False])
def test_pictures_and_captions_of_parquet_files_are_written_out_once(photographs, tmp_path, named):
    """Those of the train split, in their order, whatever they were called."""
    stored, captions = images(photographs, named), ["one", "two", ["three", "drei"], "four", "five"]
    source = tmp_path / "set" / "data"
    write_parquet(source / "train-00000-of-00002.parquet", image=stored[:2], text=captions[:2], other=[1, 2])
    write_parquet(source / "train-00001-of-00002.parquet", image=stored[2:3], text=captions[2:3])
    write_parquet(source / "test-00000-of-00001.parquet", image=stored[3:], text=captions[3:])
    folder = find(tmp_path / "set", tmp_path / "run")
    assert folder.parent == tmp_path / "run" / "cache"
    expected = list(zip(photographs.values(), [("one",), ("two",), ("three", "drei")], strict=False))
    assert prompts(folder) == expected
    assert {path.suffix for path in find_pictures(folder)[0]} == {".png"}
    there = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert find(tmp_path / "set", tmp_path / "run") == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == there
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_other_bytes_or_columns_are_another_folder(photographs, tmp_path):
    write_parquet(tmp_path / "set" / "a.parquet", image=images(photographs), text=list("abcde"), long=list("fghij"))
    own, cache = tmp_path / "run", tmp_path / "kept"
    first = find(tmp_path / "set", own, cache=cache)
    assert first.parent == cache
    assert find(tmp_path / "set", own, ("image",), cache=cache) != first
    assert not (find(tmp_path / "set", own, ("image",), cache=cache) / "metadata.jsonl").exists()
    assert [text for _, text in prompts(find(tmp_path / "set", own, ("image", "long")), "long")] == [
        *map(tuple, "fghij")
    ]
    write_parquet(tmp_path / "set" / "a.parquet", image=images(photographs)[1:], text=list("abcd"))
    assert find(tmp_path / "set", own, cache=cache) != first


def test_plain_bytes_are_pictures_too(photographs, tmp_path):
    write_parquet(tmp_path / "set" / "x.parquet", jpg=list(photographs.values()), text=list("abcde"))
    assert [own for own, _ in prompts(find(tmp_path / "set", tmp_path / "run", ("jpg", "text")))] == [
        *photographs.values()
    ]


@pytest.mark.parametrize(
    ("pictures", "metadata", "prefix"),
    [("", "metadata.jsonl", ""), ("train", "train/metadata.jsonl", ""), ("train", "metadata.jsonl", "train/")],
)
def test_a_folder_of_pictures_is_read_where_it_is(photographs, tmp_path, pictures, metadata, prefix):
    source = tmp_path / "set"
    (source / pictures).mkdir(parents=True)
    (source / "test").mkdir()
    for name, own in photographs.items():
        (source / pictures / name).write_bytes(own)
    if pictures:
        (source / "test" / "9.png").write_bytes(b"of another split")
    rows = [{"file_name": prefix + name, "text": f"star {name}"} for name in photographs]
    (source / metadata).write_text("\n".join(map(json.dumps, rows)))
    folder = find(source, tmp_path / "run")
    assert folder == source / pictures
    assert prompts(folder) == [(own, (f"star {name}",)) for name, own in photographs.items()]
    assert not (tmp_path / "run").exists()


def test_one_of_several_folders_is_named(photographs, tmp_path):
    for name, own in (("small", images(photographs)[:2]), ("large", images(photographs))):
        write_parquet(tmp_path / "set" / name / "train" / "0000.parquet", image=own)
    found = find(tmp_path / "set", tmp_path / "run", ("image",), "small")
    assert len(find_pictures(found)[0]) == 2
    with pytest.raises(WeightError) as error:
        find(tmp_path / "set", tmp_path / "run", ("image",))
    assert str(error.value) == (
        f"{tmp_path / 'set'}: expected data in one folder, found it in large/train, small/train; "
        "name one by --dataset_config_name"
    )


@pytest.mark.parametrize(
    ("files", "config_name", "said"),
    [
        (["README.md", ".gitattributes"], None, "expected pictures or parquet files, found .md; save it in one of "),
        ([], None, "expected pictures or parquet files, found neither; save it in one of these forms"),
        (["train-0.tar", "train.zip"], None, "expected pictures or parquet files, found .tar, .zip; save it in one of"),
        (["data-00000-of-00001.arrow", "state.json"], None, "expected pictures or parquet files, found .arrow, .json"),
        (["a/0.parquet"], "b", "expected pictures or parquet files in a folder b, found neither; save it"),
        (["data/test-0.parquet", "data/validation-0.parquet"], None, "expected a split train, found test, val"),
        (["test/0.png"], None, "expected a split train, found test"),
        (["cats/0.png", "dogs/0.png"], None, "expected data in one folder, found it in cats, dogs; name one by"),
    ],
)  # fmt: skip
def test_other_forms_are_refused_by_name(hub, tmp_path, files, config_name, said):  # noqa: F811
    """Here and on the hub, of which nothing is fetched then."""
    (tmp_path / "set").mkdir()
    for name in files:
        (tmp_path / "set" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "set" / name).touch()
    hub.answers["owner/name"] = files
    for name in (str(tmp_path / "set"), "owner/name"):
        with pytest.raises(WeightError) as error:
            find(name, tmp_path / "run", config_name=config_name)
        assert str(error.value).startswith(f"{name}: {said}")
    assert not hub.fetched
    assert not (tmp_path / "run").exists()


def test_an_unknown_column_lists_those_that_are_there(photographs, tmp_path):
    write_parquet(tmp_path / "set" / "x.parquet", image=images(photographs), text=list("abcde"))
    for columns, lacking in ((("picture", "text"), "picture"), (("image", "caption"), "caption")):
        with pytest.raises(DataError) as error:
            find(tmp_path / "set", tmp_path / "run", columns)
        assert str(error.value) == f"{tmp_path / 'set' / 'x.parquet'}: no column {lacking}; it has image, text"
    write_parquet(tmp_path / "set" / "y.parquet", picture=images(photographs), text=list("abcde"))
    with pytest.raises(DataError, match=r"y\.parquet: no column image; it has picture, text$"):
        find(tmp_path / "set", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("picture", [{"bytes": None, "path": "01.png"}, None, "01.png", 7])
def test_a_row_without_a_picture_leaves_nothing_behind(photographs, tmp_path, picture):
    stored = [images(photographs)[0] if isinstance(picture, dict | None) else picture, picture]
    write_parquet(tmp_path / "set" / "x.parquet", image=stored)
    row = 1 if isinstance(picture, dict | None) else 0
    with pytest.raises(DataError, match=f"row {row} has no picture's bytes in column image$"):
        find(tmp_path / "set", tmp_path / "run", ("image",))
    assert not list((tmp_path / "run" / "cache").iterdir())


def test_a_damaged_file_and_one_that_is_none_are_one_line(photographs, tmp_path):
    path = tmp_path / "set" / "x.parquet"
    write_parquet(path, image=images(photographs))
    whole = path.read_bytes()
    write_parquet(path.parent / "a.parquet", image=images(photographs))
    for damaged in (whole[:-9], b"version https://git-lfs", whole[:100] + bytes(len(whole) - 200) + whole[-100:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError) as error:
            find(tmp_path / "set", tmp_path / "run", ("image",))
        assert str(error.value).startswith(f"{path}: no parquet file that can be read (")
        assert "\n" not in str(error.value)
    write_parquet(path, image=["01.png"])
    with pytest.raises(DataError, match="row 5 has no picture's bytes in column image"):
        find(tmp_path / "set", tmp_path / "run", ("image",))


def test_captions_that_are_no_text_are_refused_as_anywhere(photographs, tmp_path):
    write_parquet(
        tmp_path / "set" / "x.parquet",
        image=images(photographs),
        text=[1, 2, 3, 4, 5],
    )
    with pytest.raises(DataError, match=r"empty or not text in column text of metadata\.jsonl, 5 found"):
        prompts(find(tmp_path / "set", tmp_path / "run"))


def test_without_pyarrow_the_message_says_what_to_install(photographs, tmp_path, monkeypatch):
    write_parquet(tmp_path / "set" / "x.parquet", image=images(photographs))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"parquet files are read by pyarrow; pip install pyarrow$"):
        find(tmp_path / "set", tmp_path / "run", ("image",))


def test_a_disk_without_room_is_told_first(photographs, tmp_path, monkeypatch):
    write_parquet(tmp_path / "set" / "x.parquet", image=images(photographs))
    monkeypatch.setattr("dreambooth_ms.atomic.shutil.disk_usage", lambda path: type("", (), {"free": 10}))
    with pytest.raises(WeightError, match="No space left on device"):
        find(tmp_path / "set", tmp_path / "run", ("image",))
    assert not (tmp_path / "run").exists()


def test_a_file_is_not_a_data_set(photographs, tmp_path):
    write_parquet(tmp_path / "x.parquet", image=images(photographs))
    with pytest.raises(WeightError, match=r"x\.parquet: is a file; name its folder$"):
        find(tmp_path / "x.parquet", tmp_path / "run", ("image",))


# --- On the hub ---


def test_of_the_hub_only_the_train_split_is_fetched(hub, tmp_path):  # noqa: F811
    hub.answers["owner/name"] = {
        "README.md", "train/1.png", "train/1.txt", "train/metadata.csv", "metadata.jsonl", "test/1.png", "notes.txt",
    }  # fmt: skip
    root = hub.folder("owner/name", "dataset") / "snapshots" / COMMIT
    assert find("owner/name", tmp_path / "run") == root / "train"
    assert set(hub.fetched) == {"train/1.png", "train/1.txt", "train/metadata.csv", "metadata.jsonl"}
    hub.fetched.clear()
    cache = tmp_path / "kept"
    assert find("owner/name", tmp_path / "run", cache=cache).is_relative_to(cache / "datasets--owner--name")
    hub.answers["owner/name"] = answered(503)
    assert find("owner/name", tmp_path / "run", cache=cache).is_relative_to(cache)


def test_parquet_files_of_the_hub(hub, photographs, tmp_path):  # noqa: F811
    hub.answers["owner/name"] = {"README.md", "01.png", "data/train-00000-of-00001.parquet"}
    with pytest.raises(DataError, match="no parquet file that can be read"):
        find("owner/name", tmp_path / "run")  # The hub here holds nothing but zeros.
    assert hub.fetched == ["data/train-00000-of-00001.parquet"]
    root = hub.folder("owner/name", "dataset") / "snapshots" / COMMIT
    write_parquet(root / hub.fetched[0], image=images(photographs), text=list("abcde"))
    assert len(prompts(find("owner/name", tmp_path / "run"))) == 5


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("owner/none", "owner/none: not on the hub, or private: check the spelling, or log in"),
        ("folder that is not there", "no such file or folder; a name on the hub has the form owner/dataset"),
    ],
)
def test_a_data_set_that_is_nowhere(hub, tmp_path, name, said):  # noqa: F811
    with pytest.raises(UserError) as error:
        find(name, tmp_path / "run")
    assert said in str(error.value)


# --- Flags ---

BASE = ["--pretrained_model_name_or_path", "base", "--instance_prompt", "a sks dog"]


def test_the_published_flags_are_taken():
    config = load(TrainConfig, [*BASE, "--dataset_name", "owner/name", "--caption_column", "prompt", "--repeats", "3"])
    assert (config.data.dataset_name, config.data.image_column, config.data.repeats) == ("owner/name", "image", 3)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dataset_name", "d", "--instance_data_dir", "p"],
         "--dataset_name: and --instance_data_dir are two sources of pictures; give one"),
        ([], "--instance_data_dir: required"),
        (["--dataset_name", "d", "--class_data_dir", "d", "--with_prior_preservation", "--class_prompt", "a dog"],
         "--class_data_dir: expected another folder than --instance_data_dir, or class pictures would mix"),
        (["--dataset_name", ""], "--dataset_name: expected not empty, got ''"),
        (["--dataset_name", "d", "--repeats", "0"], "--repeats: expected greater than 0, got 0"),
        (["--dataset_name", "d", "--image_column", ""], "--image_column: expected not empty, got ''"),
        (["--instance_data_dir", "p", "--save_precision", "int8"], "--save_precision: expected one of fp32, fp16"),
        (["--instance_data_dir", "p", "--clip_skip", "-1"], "--clip_skip: expected at least 0, got -1"),
        (["--instance_data_dir", "p", "--clip_skip", "one"], "--clip_skip: expected a whole number, got 'one'"),
        (["--instance_data_dir", "p", "--clip_stop_at_last_layers", "0"], "--clip_skip: expected at least 0, got -1"),
    ],
)  # fmt: skip
def test_flags_that_do_not_go_together(flags, said):
    with pytest.raises(ConfigError) as error:
        load(TrainConfig, [*BASE, *flags])
    assert any(line.startswith(said) for line in str(error.value).splitlines()), str(error.value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--instance_data_dir", "p", "--image_column", "jpg"], "--image_column has no effect without --dataset_name"),
        (["--instance_data_dir", "p", "--cache_dir", "c"], "--cache_dir has no effect without --dataset_name"),
        (["--instance_data_dir", "p", "--repeats", "2", "--max_train_steps", "9"],
         "--repeats has no effect beside --max_train_steps and for a single subject"),
    ],
)  # fmt: skip
def test_flags_that_nothing_reads_are_told(flags, said):
    notes = []
    load(TrainConfig, [*BASE, *flags], notes.append)
    assert said in notes

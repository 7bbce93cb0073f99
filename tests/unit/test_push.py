"""Results on the hub: what is uploaded and what is not, the model card, and what may go wrong."""

import json
import re
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard, constants
from PIL import Image

from dreambooth_ms.cli import push as command
from dreambooth_ms.cli.device import found_adapters
from dreambooth_ms.cli.main import main
from dreambooth_ms.cli.model_card import is_edited, marked
from dreambooth_ms.config.load import load, to_yaml
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.errors import WeightError
from dreambooth_ms.formats.files.open import write_tensors
from dreambooth_ms.sampling.picture_file import validation_name, write_picture
from dreambooth_ms.training.checkpoint import STEP_KEY
from dreambooth_ms.weights.hub import base_of_card, find_adapter
from tests.fake_hub import COMMIT, OWNER, TOKEN, point_at, running_hub

LORA = "pytorch_lora_weights.safetensors"
PROMPT = 'a photo of "sks" star'
BASE = {"pretrained_model_name_or_path": "/home/me/models/base"}


@pytest.fixture(scope="module")
def server():
    with running_hub() as hub:
        yield hub


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """Without repositories, and the current folder empty."""
    point_at(server, monkeypatch, tmp_path / "cache")
    server.__dict__.update(files={}, private={}, requests=[], commits=[], faults={}, role="write", objects={})
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return server


@pytest.fixture
def run_folder(hub, tmp_path):
    """A run as it stands in the end, with all that is nobody's business."""
    folder = tmp_path / "here" / "runs" / "star"
    flags = ["--pretrained_model_name_or_path", "owner/base", "--instance_data_dir", "/home/me/photographs"]
    flags += ["--instance_prompt", PROMPT, "--max_train_steps", "20", "--rank", "2", "--hub_token", TOKEN]
    config = load(TrainConfig, [*flags, "--push_to_hub", "--output_dir", str(folder)], lambda note: None)
    for name in ("checkpoint-20", "logs", "cache", "validation", "profile"):
        (folder / name).mkdir(parents=True)
        (folder / name / "secret.bin").write_bytes(b"x")
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "history.jsonl").write_text("{}\n")
    (folder / "before_after.png").write_bytes(b"photographs")
    write_tensors(folder / LORA, {"lora": np.arange(3000, dtype=np.float32)}, {STEP_KEY: "20"})
    write_tensors(folder / "<new1>.safetensors", {"<new1>": np.ones(3, np.float32)}, {STEP_KEY: "20"})
    write_tensors(folder / "of_another.safetensors", {"x": np.ones(3, np.float32)})
    for step in (10, 20, 30):
        for number in range(2):
            path = folder / "validation" / validation_name(step, number)
            write_picture(path, np.full((8, 8, 3), step, np.uint8), {"prompt": f"prompt {number}", **BASE})
    return folder


def push(folder, *more, token=("--hub_token", TOKEN)):
    return main(["push", str(folder), *token, *more])


UPLOADED = [LORA, "<new1>.safetensors", "README.md", "images/0.png", "images/1.png"]


def test_a_result_its_card_and_its_last_pictures_are_uploaded_and_nothing_else(hub, run_folder, capfd):
    assert push(run_folder, "--hub_private_repo") == 0
    assert hub.commits == [(f"{OWNER}/star", sorted(UPLOADED))]
    assert hub.private == {f"{OWNER}/star": True}
    held = hub.files[f"{OWNER}/star"]
    assert held[LORA] == (run_folder / LORA).read_bytes()
    with Image.open(BytesIO(held["images/1.png"])) as picture:
        assert np.asarray(picture).min() == np.asarray(picture).max() == 20
        assert json.loads(picture.info["dreambooth_ms"]) == {
            "prompt": "prompt 1",
            "pretrained_model_name_or_path": "base",
        }
        assert "/home/me" not in str(picture.info)
    assert f"uploaded 5 files to {hub.url}/{OWNER}/star" in capfd.readouterr().err
    assert all(b"/home/me" not in content and TOKEN.encode() not in content for content in held.values())


def test_a_second_push_of_the_same_makes_no_commit(hub, run_folder):
    assert push(run_folder) == push(run_folder) == 0
    assert len(hub.commits) == 1


def test_the_card_says_what_it_is(hub, run_folder):
    assert push(run_folder, "--hub_model_id", "the-group/dog") == 0
    card = ModelCard(hub.files["the-group/dog"]["README.md"].decode())
    assert card.content.encode() == (run_folder / "README.md").read_bytes()
    data = card.data.to_dict()
    assert data["base_model"] == "owner/base"
    assert data["instance_prompt"] == PROMPT
    assert {"text-to-image", "lora", "dreambooth", "template:sd-lora"} <= {*data["tags"]}
    pictures = [{"output": {"url": f"images/{n}.png"}, "text": f"prompt {n}"} for n in range(2)]
    assert [{**one} for one in data["widget"]] == pictures
    for text in (f"- `{PROMPT}`", "<Gallery />", "| rank | 2 |", "| max_train_steps | 20 |", "for 20 steps"):
        assert text in card.text, text
    assert f'load_lora_weights("the-group/dog", weight_name="{LORA}")' in card.text
    assert "photographs" not in card.content


def test_the_card_of_a_published_family_has_its_licence(hub, run_folder, monkeypatch):
    monkeypatch.setattr("dreambooth_ms.cli.model_card._family", lambda path: "SDXL base")
    assert push(run_folder) == 0
    data = ModelCard(hub.files[f"{OWNER}/star"]["README.md"].decode()).data.to_dict()
    assert data["license"] == "openrail++"
    assert "stable-diffusion-xl" in data["tags"]


def test_a_base_that_is_a_folder_here_is_no_name_on_the_hub(hub, run_folder, monkeypatch):
    monkeypatch.setattr("dreambooth_ms.cli.model_card._family", lambda path: "SDXL base")
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    config["model"]["pretrained_model_name_or_path"] = "/home/me/models/sd15"
    (run_folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert push(run_folder) == 0
    card = ModelCard(hub.files[f"{OWNER}/star"]["README.md"].decode())
    assert card.data.base_model is card.data.license is None
    assert "LoRA of sd15" in card.text
    assert "/home/me" not in card.content


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_card_is_edited_if_its_mark_is_not_that_of_its_text(ending):
    card = marked("---\ntags: [a]\n---\n\ntext\n")
    assert not is_edited(card)
    assert is_edited(card.replace("text", "my text"))
    assert is_edited("# mine\n")


def test_a_card_that_was_edited_there_stays(hub, run_folder, capfd):
    assert push(run_folder) == 0
    edited = hub.files[f"{OWNER}/star"]["README.md"] + b"by hand\n"
    hub.add(f"{OWNER}/star", **{"README.md": edited})
    write_tensors(run_folder / LORA, {"lora": np.zeros(3000, np.float32)}, {STEP_KEY: "20"})
    assert push(run_folder) == 0
    assert LORA in hub.commits[1][1]
    assert "README.md" not in hub.commits[1][1]
    assert hub.files[f"{OWNER}/star"]["README.md"] == edited
    assert "its README.md was edited by hand, and stays" in capfd.readouterr().err


def test_a_card_that_was_edited_here_is_uploaded_as_it_is(hub, run_folder, capfd):
    (run_folder / "README.md").write_text("# mine\n")
    assert push(run_folder) == 0
    assert hub.files[f"{OWNER}/star"]["README.md"] == b"# mine\n"
    assert (run_folder / "README.md").read_text() == "# mine\n"
    assert "edited by hand, and uploaded as it is" in capfd.readouterr().err


def test_a_card_that_was_written_here_follows_the_run(hub, run_folder):
    assert push(run_folder) == 0
    config = (run_folder / "config.yaml").read_text()
    (run_folder / "config.yaml").write_text(config.replace("rank: 2", "rank: 8"))
    assert push(run_folder) == 0
    assert "README.md" in hub.commits[1][1]
    assert b"| rank | 8 |" in hub.files[f"{OWNER}/star"]["README.md"]


AGAIN = re.compile(
    r"nothing is lost: \S+star has the result, `dreambooth-ms push \S+star --hub_model_id alice/star` tries"
)


@pytest.mark.parametrize(
    ("fault", "statuses", "said"),
    [
        ("PUT /objects", ["cut"] * 99, "cannot be reached"),
        ("preupload", [403], "the hub does not let your token write it (403)"),
        ("commit/main", [401], "the hub does not know your token (401)"),
        ("commit/main", [500] * 9, "the hub answered 500; try again later"),
        ("commit/main", [429] * 9, "the hub answered 429 (too many requests); wait some minutes"),
        ("GET .*README", [500] * 9, "the hub answered 500; try again later"),
        ("HEAD .*README", [500] * 9, "the hub answered 500; try again later"),
        ("commit/main", ["cut"] * 9, "cannot be reached"),
    ],
)
def test_a_failed_upload_loses_nothing_and_says_how_to_go_on(
    hub, run_folder, capfd, monkeypatch, fault, statuses, said
):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    before = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    if "README" in fault:
        hub.add(f"{OWNER}/star", **{"README.md": b"# theirs\n"})
        hub.faults["HEAD .*README"] = statuses
    hub.faults[fault] = statuses
    assert push(run_folder) == 2
    error = capfd.readouterr().err
    assert said in error
    assert AGAIN.search(error)
    assert TOKEN not in error
    assert not hub.commits
    assert {path: path.read_bytes() for path in before} == before
    hub.faults.clear()
    assert push(run_folder, "--hub_model_id", f"{OWNER}/star") == 0
    assert hub.files[f"{OWNER}/star"][LORA] == before[run_folder / LORA]


@pytest.mark.parametrize(
    ("more", "role", "said"),
    [
        ([], "read", "alice/star: the token of alice may only read; make one that may write, at"),
        (["--hub_model_id", "bob/star"], "write", "bob/star: alice is not bob, nor one of its members; owners may be"),
        (["--hub_model_id", "a/b/c"], "write", "--hub_model_id: expected name or owner/name, got 'a/b/c'"),
    ],
)
def test_who_may_not_write_is_told_before_anything(hub, run_folder, capfd, more, role, said):
    hub.role = role
    assert push(run_folder, *more) == 2
    assert said.removeprefix("alice/") in capfd.readouterr().err
    assert not hub.asked("repos/create")


def test_without_a_token_it_is_told_how_to_log_in(hub, run_folder, capfd):
    assert push(run_folder, token=()) == 2
    assert (
        "there is no token: log in with `hf auth login`, or set HF_TOKEN, with a token that may"
        in capfd.readouterr().err
    )
    assert push(run_folder, token=("--hub_token", "hf_wrong")) == 2
    error = capfd.readouterr().err
    assert "the hub does not know your token (401): log in" in error
    assert "hf_wrong" not in error


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("runs", "runs: holds no result of a training"),
        ("runs/satr", "runs/satr: no such folder; did you mean runs/star?"),
    ],
)
def test_a_folder_without_a_result_is_told(hub, run_folder, capfd, folder, said):
    assert push(folder) == 2
    assert said in capfd.readouterr().err
    assert not hub.requests


def test_a_folders_name_that_is_none_for_a_repository_is_told(hub, run_folder, capfd):
    other = run_folder.rename(run_folder.with_name("my star!"))
    assert push(other) == 2
    assert "--hub_model_id: missing, and my star! is no name for a repository" in capfd.readouterr().err


def test_a_model_is_uploaded_by_its_index(hub, tmp_path):
    folder = tmp_path / "model"
    for name in ("unet/diffusion_pytorch_model.safetensors", "unet/config.json", "tokenizer/vocab.json", "cache/x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "x", "unet": ["a", "b"], "tokenizer": ["a", "b"]})
    )
    files = command._files(folder, SimpleNamespace(path=folder / "unet/diffusion_pytorch_model.safetensors"))
    assert [*files] == [
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json"
    ]  # fmt: skip


# --- The other way ---


def test_what_was_uploaded_is_found_again_at_a_revision_and_by_its_base(hub, run_folder, capfd):
    assert push(run_folder) == 0
    root = find_adapter(f"{OWNER}/star@{COMMIT}")
    assert {path.name for path in root.iterdir()} == {LORA, "<new1>.safetensors"}
    assert (root / LORA).read_bytes() == (run_folder / LORA).read_bytes()
    assert base_of_card(f"{OWNER}/star") == base_of_card(str(run_folder)) == "owner/base"
    assert base_of_card("nobody/nothing") is None
    # Neither here nor a name of the hub.
    assert base_of_card("my dog") is base_of_card(f"modelscope:{OWNER}/star") is None


@pytest.mark.parametrize("place", ["the hub", "a run", "a card"])
def test_where_no_base_is_given_that_of_the_training_is_offered(hub, run_folder, capfd, place):
    assert push(run_folder) == 0
    if place == "a card":
        (run_folder / "config.yaml").unlink()
    name = f"{OWNER}/star" if place == "the hub" else str(run_folder)
    assert main(["sample", "--lora", name, "--prompt", "x"]) == 2
    assert f"--pretrained_model_name_or_path: required; {name} was trained on owner/base" in capfd.readouterr().err


def test_a_file_at_a_revision(hub):
    hub.add("owner/dog", **{"dog.safetensors": b"x" * 100})
    assert find_adapter("owner/dog@main/dog.safetensors").read_bytes() == b"x" * 100
    with pytest.raises(WeightError, match="has no --revision v9; name a branch"):
        find_adapter("owner/dog@v9")


def test_a_download_that_is_cut_goes_on_where_it_was(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # What has not come as a whole piece is lost.
    content = np.random.default_rng(0).bytes(200_000)
    hub.add("owner/dog", **{"dog.safetensors": content})
    hub.faults["GET .*resolve"] = ["half"] * 3
    assert find_adapter("owner/dog").read_bytes() == content
    assert hub.asked("RANGE") == ["RANGE 100000", "RANGE 150000", "RANGE 175000"]


def test_a_download_that_brings_nothing_ends(hub, capfd, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.add("owner/dog", **{"dog.safetensors": b"x" * 1000})
    hub.faults["GET .*resolve"] = ["cut"] * 99
    with pytest.raises(WeightError, match=r"owner/dog: the hub, .* cannot be reached"):
        find_adapter("owner/dog")


def test_of_the_epochs_of_kohyas_scripts_the_last_is_taken_and_told(hub, capfd):
    names = ["dog-000010.safetensors", "dog-000020.safetensors", "dog.safetensors"]
    hub.add("owner/dog", **{name: name.encode() for name in names})
    assert [path.read_bytes() for path in found_adapters(["owner/dog"])] == [b"dog.safetensors"]
    assert "owner/dog: its dog.safetensors" in capfd.readouterr().err


def test_modelscope_by_its_client(tmp_path, monkeypatch, capfd):
    asked = []

    class HubApi:
        def get_model_files(self, repository, revision, recursive):
            asked.append((repository, revision, recursive))
            return [{"Path": name} for name in ("README.md", "dog.safetensors")]

    def snapshot_download(repository, revision, allow_patterns):
        asked.append(allow_patterns)
        (tmp_path / "dog.safetensors").write_bytes(b"x")
        return str(tmp_path)

    client = SimpleNamespace(
        snapshot_download=snapshot_download, hub=SimpleNamespace(api=SimpleNamespace(HubApi=HubApi))
    )
    modules = {"modelscope": client, "modelscope.hub": client.hub, "modelscope.hub.api": client.hub.api}
    for name, module in modules.items():
        monkeypatch.setitem(__import__("sys").modules, name, module)
    assert find_adapter("modelscope:owner/dog@v1") == tmp_path / "dog.safetensors"
    assert asked == [("owner/dog", "v1", True), ["dog.safetensors"]]


def test_without_modelscopes_client_it_is_told(monkeypatch, capfd):
    monkeypatch.setitem(__import__("sys").modules, "modelscope", None)
    assert main(["sample", "--pretrained_model_name_or_path", "modelscope:owner/dog", "--prompt", "x"]) == 2
    assert (
        "modelscope:owner/dog: ModelScope's client is not installed; pip install modelscope" in capfd.readouterr().err
    )

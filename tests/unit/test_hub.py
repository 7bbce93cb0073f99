"""What users name: a path here, or a name on the hub, of which only what is used is fetched."""

import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import requests
from huggingface_hub import constants, errors
from huggingface_hub.hf_api import RepoSibling

from dreambooth_ms.errors import WeightError, near
from dreambooth_ms.weights.hub import find_adapter, find_encoder, find_model, find_vae

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SIZE = 1000
"""Bytes of every file on the hub here."""


def in_folders(**folders):
    return {f"{folder}/{name}" for folder, names in folders.items() for name in names.split()}


TOKENIZER = "merges.txt special_tokens_map.json tokenizer_config.json vocab.json"
SD_15 = {
    ".gitattributes", "README.md", "model_index.json", "v1-5-pruned-emaonly.ckpt", "v1-5-pruned-emaonly.safetensors",
    "v1-5-pruned.ckpt", "v1-5-pruned.safetensors", "v1-inference.yaml",
} | in_folders(
    feature_extractor="preprocessor_config.json",
    safety_checker="config.json model.fp16.safetensors model.safetensors pytorch_model.bin pytorch_model.fp16.bin",
    scheduler="scheduler_config.json",
    text_encoder="config.json model.fp16.safetensors model.safetensors pytorch_model.bin pytorch_model.fp16.bin",
    tokenizer=TOKENIZER,
    unet="config.json diffusion_pytorch_model.bin diffusion_pytorch_model.fp16.bin "
    "diffusion_pytorch_model.fp16.safetensors diffusion_pytorch_model.non_ema.bin "
    "diffusion_pytorch_model.non_ema.safetensors diffusion_pytorch_model.safetensors",
    vae="config.json diffusion_pytorch_model.bin diffusion_pytorch_model.fp16.bin "
    "diffusion_pytorch_model.fp16.safetensors diffusion_pytorch_model.safetensors",
)  # fmt: skip
SDXL = {
    ".gitattributes", "01.png", "LICENSE.md", "README.md", "comparison.png", "model_index.json", "pipeline.png",
    "sd_xl_base_1.0.safetensors", "sd_xl_base_1.0_0.9vae.safetensors", "sd_xl_offset_example-lora_1.0.safetensors",
} | in_folders(
    scheduler="scheduler_config.json",
    **dict.fromkeys(
        ("text_encoder", "text_encoder_2"),
        "config.json flax_model.msgpack model.fp16.safetensors model.onnx model.onnx_data model.safetensors "
        "openvino_model.bin openvino_model.xml",
    ),
    **dict.fromkeys(("tokenizer", "tokenizer_2"), TOKENIZER),
    unet="config.json diffusion_flax_model.msgpack diffusion_pytorch_model.fp16.safetensors "
    "diffusion_pytorch_model.safetensors model.onnx model.onnx_data openvino_model.bin openvino_model.xml",
    **dict.fromkeys(
        ("vae", "vae_1_0"),
        "config.json diffusion_flax_model.msgpack diffusion_pytorch_model.fp16.safetensors "
        "diffusion_pytorch_model.safetensors",
    ),
    **dict.fromkeys(("vae_decoder", "vae_encoder"), "config.json model.onnx openvino_model.bin openvino_model.xml"),
)  # fmt: skip
PICKLED = {name for name in SD_15 if not name.endswith(".safetensors") and ".fp16." not in name}
HALF = {name for name in SD_15 if not name.endswith((".safetensors", ".bin")) or ".fp16." in name}
SHARDED = {name for name in SDXL if not name.startswith("unet/")} | in_folders(
    unet="config.json diffusion_pytorch_model.safetensors.index.json "
    "diffusion_pytorch_model-00001-of-00002.safetensors diffusion_pytorch_model-00002-of-00002.safetensors "
    "diffusion_pytorch_model.safetensors.index.fp16.json diffusion_pytorch_model.fp16-00001-of-00001.safetensors"
)
CLIP = {
    ".gitattributes", "README.md", "config.json", "flax_model.msgpack", "merges.txt", "preprocessor_config.json",
    "pytorch_model.bin", "special_tokens_map.json", "tf_model.h5", "tokenizer.json", "tokenizer_config.json",
    "vocab.json",
}  # fmt: skip
LARGE_CLIP = CLIP | {"model.safetensors"}
VAE = {
    "README.md",
    "config.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.safetensors",
    "sdxl_vae.safetensors",
}
IN_CHECKPOINT = "checkpoint-500/pytorch_lora_weights.safetensors"
DIFFUSERS_LORA = {"README.md", "pytorch_lora_weights.safetensors", "checkpoint-500/optimizer.bin", IN_CHECKPOINT}
PEFT_LORA = in_folders(unet="adapter_config.json adapter_model.bin adapter_model.safetensors README.md") | {"README.md"}
KOHYA_LORA = {"README.md", "dog [v1].safetensors", "training_state.bin"}
OF_CUSTOM_DIFFUSION = {
    "README.md", "0.png", "pytorch_custom_diffusion_weights.bin", "<new1>.bin", "<new2>.bin", "<new2>.safetensors",
}  # fmt: skip
MANY_LORAS = {"README.md", "dog-000001.safetensors", "dog-000002.safetensors", "dog.safetensors"}


class Hub:
    """Stands for the hub: repositories by name, or what it answers with in their place."""

    def __init__(self, cache):
        self.cache, self.answers, self.asked, self.fetched = cache, {}, [], []

    def folder(self, repository, kind="model", cache=None):
        return Path(cache or self.cache) / f"{kind}s--{repository.replace('/', '--')}"

    def model_info(self, repository, revision=None, files_metadata=False, timeout=None):
        self.asked.append(repository)
        answer = self.answers.get(repository, repository_not_found())
        if isinstance(answer, Exception):
            raise answer
        assert files_metadata
        assert timeout
        siblings = [RepoSibling(name, size=SIZE, blob_id="0") for name in sorted(answer)]
        return huggingface_hub.ModelInfo(
            id=repository, sha=COMMIT, siblings=[vars(one) | {"blobId": "0"} for one in siblings]
        )

    dataset_info = model_info

    def snapshot_download(
        self, repository, repo_type, revision=None, cache_dir=None, allow_patterns=None, local_files_only=False
    ):
        root = self.folder(repository, repo_type, cache_dir) / "snapshots" / COMMIT
        if local_files_only:
            if root.is_dir():
                return str(root)
            raise errors.LocalEntryNotFoundError("not cached")
        for name in self.answers[repository]:
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                self.fetched.append(name)
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(bytes(SIZE))
        return str(root)


def answered(status, kind=errors.HfHubHTTPError):
    response = requests.Response()
    response.status_code = status
    response.request = requests.Request("GET", "http://hub/api").prepare()
    return kind(f"{status} Client Error. (Request ID: Root=1)\n\nsomething long", response=response)


def repository_not_found():
    return answered(401, errors.RepositoryNotFoundError)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with an empty cache, and an empty current folder."""
    hub = Hub(tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub.cache))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return hub


# --- What is fetched ---


def weights_of(names, suffixes=(".safetensors", ".bin")):
    return {name for name in names if name.endswith(suffixes)}


def plain(dotted="", kind="safetensors", encoders=("text_encoder",)):
    """A weight file for each network."""
    text = "model" if kind == "safetensors" else "pytorch_model"
    return {f"{part}/diffusion_pytorch_model{dotted}.{kind}" for part in ("unet", "vae")} | {
        f"{encoder}/{text}{dotted}.{kind}" for encoder in encoders
    }


def sharded(dotted, count):
    shards = {f"unet/diffusion_pytorch_model{dotted}-0000{i + 1}-of-0000{count}.safetensors" for i in range(count)}
    return plain(dotted, encoders=BOTH) - {f"unet/diffusion_pytorch_model{dotted}.safetensors"} | shards


BOTH = ("text_encoder", "text_encoder_2")


@pytest.mark.parametrize(
    ("files", "variant", "weights"),
    [
        (SD_15, None, plain()),
        (SD_15, "fp16", plain(".fp16")),
        (HALF, None, plain(".fp16")),
        (PICKLED, None, plain(kind="bin")),
        (SDXL, None, plain(encoders=BOTH)),
        (SDXL, "fp16", plain(".fp16", encoders=BOTH)),
        (SHARDED, None, sharded("", 2)),
        (SHARDED, "fp16", sharded(".fp16", 1)),
    ],
    ids=["SD 1.5", "SD 1.5 fp16", "fp16 only", ".bin only", "SDXL", "SDXL fp16", "shards", "shards fp16"],
)
def test_of_a_model_only_what_is_used_is_fetched(hub, files, variant, weights):
    hub.answers["owner/model"] = files
    root = find_model("owner/model", variant=variant)
    fetched = set(hub.fetched)
    assert root == hub.folder("owner/model") / "snapshots" / COMMIT
    assert weights_of(fetched) == weights
    parts = {name.split("/")[0] for name in weights}
    others = {f"{part}/config.json" for part in parts} | {"model_index.json", "scheduler/scheduler_config.json"}
    others |= {name for name in files if name.startswith("tokenizer")}
    indexes = {name for name in fetched if ".index." in name}
    assert fetched == weights | others | indexes
    assert len(indexes) == (files is SHARDED)


def test_what_is_there_is_not_fetched_again(hub, capfd):
    hub.answers["owner/model"] = SD_15
    root = find_model("owner/model", variant="fp16")
    assert "downloading owner/model: 100%" in capfd.readouterr().err
    assert find_model("owner/model", variant="fp16") == root
    assert not capfd.readouterr().err
    assert len(hub.fetched) == len(set(hub.fetched))
    (root / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    assert find_model("owner/model", variant="fp16") == root
    assert (root / "vae" / "diffusion_pytorch_model.fp16.safetensors").is_file()


@pytest.mark.parametrize(
    ("find", "files", "fetched"),
    [
        (find_vae, VAE, {"config.json", "diffusion_pytorch_model.safetensors"}),
        (find_vae, SDXL, {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"}),
        (find_encoder, CLIP, {"config.json", "preprocessor_config.json", "pytorch_model.bin"}),
        (find_encoder, LARGE_CLIP, {"config.json", "preprocessor_config.json", "model.safetensors"}),
        (find_adapter, PEFT_LORA, {"unet/adapter_config.json", "unet/adapter_model.safetensors"}),
        (find_adapter, OF_CUSTOM_DIFFUSION, OF_CUSTOM_DIFFUSION - {"README.md", "0.png", "<new2>.bin"}),
        (find_adapter, DIFFUSERS_LORA | {"<s0>.safetensors"}, {"pytorch_lora_weights.safetensors", "<s0>.safetensors"}),
    ],
)
def test_of_others_too(hub, find, files, fetched):
    hub.answers["owner/name"] = files
    assert find("owner/name") == hub.folder("owner/name") / "snapshots" / COMMIT
    assert set(hub.fetched) == fetched


@pytest.mark.parametrize(
    ("name", "files", "file"),
    [
        ("owner/name", DIFFUSERS_LORA, "pytorch_lora_weights.safetensors"),
        ("owner/name", KOHYA_LORA, "dog [v1].safetensors"),
        ("owner/name", {"README.md", "learned_embeds.bin", "learned_embeds.safetensors"}, "learned_embeds.safetensors"),
        ("owner/name", {"README.md", "<dog>.bin"}, "<dog>.bin"),
        ("owner/name", MANY_LORAS, "dog.safetensors"),
        ("owner/name/dog-000002.safetensors", MANY_LORAS, "dog-000002.safetensors"),
        (f"owner/name/{IN_CHECKPOINT}", DIFFUSERS_LORA, IN_CHECKPOINT),
    ],
)
def test_a_lora_is_the_only_one_or_the_file_that_is_named(hub, name, files, file):
    hub.answers["owner/name"] = files
    assert find_adapter(name) == hub.folder("owner/name") / "snapshots" / COMMIT / file
    assert hub.fetched == [file]


def test_a_model_may_be_one_file_of_a_repository(hub):
    hub.answers["owner/name"] = SD_15
    assert find_model("owner/name/v1-5-pruned-emaonly.safetensors").name == "v1-5-pruned-emaonly.safetensors"
    assert hub.fetched == ["v1-5-pruned-emaonly.safetensors"]


@pytest.mark.parametrize(
    ("find", "name", "files", "said"),
    [
        (find_model, "", MANY_LORAS, "model_index.json is missing, so it is no model folder in diffusers' layout"),
        (
            find_model,
            "",
            SD_15 - weights_of(SD_15) | {"unet/flax_model.msgpack"},
            "unet/diffusion_pytorch_model.safetensors is missing (found: config.json, flax_model.msgpack)",
        ),
        (
            find_adapter,
            "",
            MANY_LORAS - {"dog.safetensors"},
            "it holds several files (dog-000001.safetensors, dog-000002.safetensors); name one, as owner/name/file",
        ),
        (find_adapter, "", {"README.md"}, "it holds no file of weights"),
        (
            find_adapter,
            "/cat.safetensors",
            MANY_LORAS,
            "there is no such file; it has README.md, dog-000001.safetensors, dog-000002.safetensors and 1 more",
        ),
    ],
)
def test_what_a_repository_lacks_is_told_before_anything_is_fetched(hub, find, name, files, said):
    hub.answers["owner/name"] = files
    with pytest.raises(WeightError) as error:
        find(f"owner/name{name}")
    assert str(error.value) == f"owner/name{name}: {said}"
    assert not hub.fetched


def test_a_variant_that_is_not_there_is_told(hub):
    hub.answers["owner/model"] = PICKLED
    with pytest.raises(
        WeightError, match=r"^owner/model: unet/.*\.fp16\.safetensors is missing .*; give another --variant"
    ):
        find_model("owner/model", variant="fp16")


def test_a_disk_without_room_is_told_before_the_download(hub, monkeypatch):
    hub.answers["owner/model"] = SD_15
    monkeypatch.setattr("dreambooth_ms.atomic.shutil.disk_usage", lambda path: SimpleNamespace(free=10 * SIZE))
    with pytest.raises(WeightError, match=r"0\.012 MB are needed, 0\.010 MB are free\); free some space .*HF_HOME$"):
        find_model("owner/model", variant="fp16")
    assert not hub.fetched


# --- What the hub answers ---

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
GATED = f"gated: accept its licence at {constants.ENDPOINT}/owner/name, and {LOG_IN}"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (answered(401, errors.GatedRepoError), GATED),
        (answered(403, errors.GatedRepoError), GATED),
        (answered(404, errors.RepositoryNotFoundError), f"not on the hub, or private: check the spelling, or {LOG_IN}"),
        (repository_not_found(), f"not on the hub, or private: check the spelling, or {LOG_IN}"),
        (answered(404, errors.RevisionNotFoundError), "has no --revision v9; name a branch, tag or commit of it"),
        (answered(403, errors.DisabledRepoError), "closed by the hub; choose another model"),
        (answered(401), f"the hub does not know your token (401): {LOG_IN}, with a token that may read it"),
        (answered(403), f"the hub does not let your token read it (403): {LOG_IN}, with a token that may read it"),
        (answered(503), "the hub answered 503; try again later"),
        (errors.HFValidationError("bad"), "not a name that the hub can have; these have the form owner/model"),
        (
            PermissionError(13, "Permission denied", "/cache"),
            "/cache cannot be written (Permission denied); name another folder with HF_HOME",
        ),
    ],
)
def test_what_the_hub_refuses_says_what_to_do(hub, answer, said):
    hub.answers["owner/name"] = answer
    with pytest.raises(WeightError) as error:
        find_model("owner/name", revision="v9")
    assert str(error.value) == f"owner/name: {said}"


def test_what_is_refused_only_when_files_are_asked_for_is_told_in_the_same_words(hub, monkeypatch):
    """As the hub does it: everybody may look at the list of a gated repository."""
    hub.answers["owner/name"] = SD_15

    def refuse(*arguments, local_files_only=False, **options):
        raise answered(403, errors.GatedRepoError)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(WeightError, match=r"^owner/name: gated: accept its licence at .*HF_TOKEN$"):
        find_model("owner/name")


@pytest.mark.parametrize("name", ["runwayml/stable-diffusion-v1-5", "stabilityai/stable-diffusion-2-1"])
def test_a_model_that_guides_name_and_that_was_removed_has_a_copy(hub, name):
    copy = f"{'stable-diffusion-v1-5' if 'v1' in name else 'sd2-community'}/{name.split('/')[1]}"
    with pytest.raises(WeightError, match=f"^{name}: removed; {copy} is a copy$"):
        find_model(name)


@pytest.mark.parametrize(
    "error", [kind("x") for kind in (requests.ConnectionError, requests.exceptions.ProxyError, requests.Timeout)]
)
def test_without_a_network_what_is_cached_is_used_and_what_is_not_is_told(hub, error):
    hub.answers["owner/model"] = SD_15
    root = find_model("owner/model", variant="fp16")
    hub.answers = {"owner/model": error, "owner/other": error}
    assert find_model("owner/model", variant="fp16") == root
    with pytest.raises(WeightError) as told:
        find_model("owner/other")
    assert str(told.value) == (
        f"owner/other: the hub, {constants.ENDPOINT}, cannot be reached ({type(error).__name__}): check the network "
        "and HTTPS_PROXY, name a mirror with HF_ENDPOINT, or copy the model to this machine and name its folder"
    )
    with pytest.raises(WeightError, match=r"cannot be reached .* \(its copy in the cache is not whole: unet/.*ema\.s"):
        find_model("owner/model", variant="non_ema")


def test_offline_mode_is_told_by_its_name(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.answers["owner/model"] = errors.OfflineModeIsEnabled("Cannot reach it")
    with pytest.raises(
        WeightError, match=r"^owner/model: not in the hub's cache, and HF_HUB_OFFLINE forbids to download"
    ):
        find_model("owner/model")


def test_a_full_disk_in_the_middle_is_left_to_who_explains_disks(hub, monkeypatch):
    hub.answers["owner/name"] = SD_15

    def fill(*arguments, **options):
        raise OSError(28, "No space left on device", "/cache/x")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fill)
    with pytest.raises(OSError, match="No space left"):
        find_model("owner/name")


# --- Paths ---


@pytest.fixture
def files(hub):
    for name in ("models/dog.safetensors", "models/Cats/x", "my model/x"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


@pytest.mark.parametrize("find", [find_model, find_vae, find_encoder, find_adapter])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./x", "; check the path"),
        ("x.safetensors", "; check the path"),
        ("a/x.ckpt", "; check the path"),
        ("a/b/c", "; check the path"),
        ("/a/b", "; check the path"),
        ("~nobody-of-that-name/b", "; check the path"),
        (r"C:\a\b.safetensors", "; check the path"),
        (r"models\dog.safetensors", "; did you mean models/dog.safetensors?"),
        (r"models\dgo.safetensors", "; did you mean models/dog.safetensors?"),
        ("models/dgo.safetensors", "; did you mean models/dog.safetensors?"),
        ("models/loras/dog.safetensors", "; check the path"),
        ("./models/cat", "; did you mean ./models/Cats?"),
        ("models/dog.safetensors/x.bin", "; check the path"),
        ("models/cats", "; did you mean models/Cats?"),
        ("model/dog.safetensors", "; did you mean models?"),
        ("models/dog", "; did you mean models/dog.safetensors?"),
        ("mymodel", "; did you mean my model?"),
        ("elsewhere", "; a name on the hub has the form owner/model"),
        ("m" * 300, "; a name on the hub has the form owner/model"),
    ],
)
def test_a_path_that_is_not_there_is_a_missing_file_and_the_nearest_is_named(hub, files, find, name, said):
    with pytest.raises(WeightError) as error:
        find(name)
    assert str(error.value) == f"{name}: no such file or folder{said}"
    assert not hub.asked


def test_what_the_hub_does_not_have_may_be_a_slip_too(hub, files):
    with pytest.raises(WeightError, match=r"^modles/dog: not on the hub, or private: .*; did you mean models\?$"):
        find_model("modles/dog")


@pytest.mark.parametrize("name", ["models/sdxl", "owner/model", "owner/model/a b.safetensors"])
def test_what_may_be_on_the_hub_is_asked_for_there(hub, files, name):
    with pytest.raises(WeightError, match="not on the hub, or private"):
        find_model(name)
    assert hub.asked == ["/".join(name.split("/")[:2])]


def test_a_path_that_is_there_is_itself_and_the_hub_is_not_asked(hub, files):
    assert find_model("models/Cats") == Path("models/Cats")
    assert find_adapter("models/dog.safetensors") == Path("models/dog.safetensors")
    assert not hub.asked


def test_nothing_near_is_nothing_said(tmp_path):
    assert near(tmp_path / "x") == ""
    assert near("/") == ""
    assert near("a\0b") == ""

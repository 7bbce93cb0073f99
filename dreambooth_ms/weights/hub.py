"""From what a user names to a file or folder on this machine: what is here, or a name on the Hugging Face hub, or on
ModelScope's."""

import glob
import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Event, Thread

from tqdm import tqdm
from yaml import YAMLError

from dreambooth_ms.adapters.file import CUSTOM_DIFFUSION, FILE_NAME, PEFT_CONFIG, PEFT_WEIGHTS
from dreambooth_ms.atomic import check_room
from dreambooth_ms.errors import ConfigError, UserError, WeightError, explain, near, show_names
from dreambooth_ms.formats.folder_layout import model_files, network_files
from dreambooth_ms.formats.naming.lora_formats import PARTS

Choose = Callable[[Collection[str]], list[str]]
"""All paths in a repository -> those of the files that are used; a WeightError says what it lacks."""

_SUFFIX = r"\.(?:safetensors|ckpt|pt|pth|bin)"
_HUB_NAME = re.compile(
    rf"(?![^/]*/[^/]*{_SUFFIX}$)(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w.-]*))?"
    rf"(?:/(?P<file>[^\\]+{_SUFFIX}))?"
)
_MODELSCOPE = "modelscope:"
"""Before names on the hub of that name."""
CARD = "README.md"
"""The model card of a repository."""
_SD2 = ("stable-diffusion-2", "stable-diffusion-2-base", "stable-diffusion-2-1", "stable-diffusion-2-1-base")
_MOVED = {f"stabilityai/{name}": f"sd2-community/{name}" for name in _SD2} | {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"
}
"""Models that guides name and that are no longer there, and their copies."""


def is_hub_name(name: str) -> bool:
    """Whether a name is of the form that repositories of the hub have, and of nothing here."""
    return _HUB_NAME.fullmatch(name) is not None and not os.path.exists(os.path.expanduser(name))


def find_model(name: str, revision: str | None = None, variant: str | None = None) -> Path:
    """The folder or file of a model: a path, `owner/model`, `owner/model@revision`, or either with
    `/file.safetensors`; with `modelscope:` before it on ModelScope.

    Of one on a hub, at a branch, tag or commit, what is read of it is downloaded once, in a variant of its weights.
    WeightError if it is neither here nor on the hub, the hub does not give it, or the disk lacks room.
    """
    return _find(name, partial(model_files, variant=variant), revision)


def find_vae(name: str) -> Path:
    """The same for an autoencoder: its own folder, that of a model, or a file."""
    return _find(name, lambda names: network_files(names, "vae", "vae/" if "vae/config.json" in names else ""))


def find_encoder(name: str) -> Path:
    """The same for a CLIP model or DINO's: a folder in transformers' layout."""
    return _find(name, partial(network_files, network="encoder"))


def find_clip(name: str | None, base: Path, base_name: str) -> Path:
    """The same for the CLIP model that measures: --clip, or that of the base; ConfigError if there is neither."""
    if not name and not (base / "clip").is_dir():
        raise ConfigError(f"--clip: {base_name} has no CLIP model; name one, such as openai/clip-vit-base-patch32")
    return find_encoder(name) if name else base / "clip"


def find_adapter(name: str) -> Path:
    """The same for an adapter or embeddings: a file, or a folder of PEFT, or of a file and new words beside it."""
    return _find(name, _adapter_files)


def find_data_set(name: str, choose: Choose, cache: str | None = None) -> tuple[Path, list[str]]:
    """The folder of a data set, and the files of it that are used; `cache`: for downloads, in place of the hub's."""
    if not os.path.exists(name):
        return _find_on_hub(name, choose, kind="dataset", cache=cache)
    if os.path.isfile(name):
        raise WeightError(f"{name}: is a file; name its folder")
    try:
        return Path(name), choose(_names_in(Path(name)))
    except WeightError as error:
        raise WeightError(f"{name}: {error}") from error


def _adapter_files(names: Collection[str]) -> list[str]:
    peft = [
        file
        for folder in ("", *(f"{part}/" for part in PARTS))
        if folder + PEFT_CONFIG in names and (own := [folder + name for name in PEFT_WEIGHTS if folder + name in names])
        for file in (folder + PEFT_CONFIG, own[0])
    ]
    if FILE_NAME not in names and peft:
        return peft
    weights = [name for name in names if re.search(f"{_SUFFIX}$", name)]
    files = sorted(name for name in weights if "/" not in name) or weights
    # Of a word in .bin and in .safetensors the latter.
    words = {Path(name).stem: name for name in files if re.fullmatch(rf"<[^/]+>{_SUFFIX}", name)}
    # Kohya's scripts write dog-000010.safetensors after the tenth epoch, and dog.safetensors after the last.
    earlier = [name for name in files if re.sub(r"-\d{6}(?=\.\w+$)", "", name) in {*files} - {name}]
    files = [name for name in files if Path(name).stem not in words and name not in earlier]
    best = [name for name in (FILE_NAME, CUSTOM_DIFFUSION) if name in files][:1]
    best = best or [name for name in files if name.endswith(".safetensors")] or files
    if len(best) > 1 or not (best or words):
        listed = f"several files ({show_names(sorted(best), at_most=9)}); name one, as owner/name/file"
        raise WeightError(f"it holds {listed if files else 'no file of weights'}")
    return [*best, *words.values()]


def _names_in(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]


def _find(name: str, choose: Choose, revision: str | None = None) -> Path:
    # Of os.path, because those of pathlib raise on names that are too long and on unknown users.
    path = os.path.expanduser(name)
    if os.path.exists(path):
        return Path(path)
    root, files = _find_on_hub(name, choose, revision)
    return root / files[0] if len(files) == 1 else root


def _find_on_hub(
    name: str, choose: Choose, revision: str | None = None, kind: str = "model", cache: str | None = None
) -> tuple[Path, list[str]]:
    named = _HUB_NAME.fullmatch(name.removeprefix(_MODELSCOPE))
    # Where there is a folder `models`, `models/dgo` is a slip of the pen.
    if named is None or (os.path.isdir(name.split("/")[0]) and (named["file"] or near(name))):
        expected = "check the path" if re.search(r"[^\w -]", name) else f"a name on the hub has the form owner/{kind}"
        raise WeightError(f"{name}: no such file or folder{near(name) or f'; {expected}'}")
    repository, file = named["repository"], named["file"]

    def one_file(names: Collection[str]) -> list[str]:
        if file not in names:
            raise WeightError(f"there is no such file; it has {show_names(sorted(names))}")
        return [file]

    fetch = _fetch_from_modelscope if name.startswith(_MODELSCOPE) else _fetch
    try:
        return fetch(repository, one_file if file else choose, named["revision"] or revision, kind, cache)
    except WeightError as error:
        raise WeightError(f"{name}: {error}{near(name)}") from error


def _fetch(
    repository: str, choose: Choose, revision: str | None, kind: str, cache: str | None
) -> tuple[Path, list[str]]:
    """A repository's folder in the hub's cache, which has the files that are used; those that it lacks are fetched."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    disable_progress_bars()  # It has one for each file, and one for their number.
    download = partial(snapshot_download, repository, repo_type=kind, revision=revision, cache_dir=cache)
    try:
        about = getattr(HfApi(), f"{kind}_info")
        info = about(repository, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (OSError, ValueError) as error:
        return _from_cache(download, choose, hub_reason(error, repository, revision, kind))
    there = {file.rfilename: file for file in info.siblings or []}
    files = choose(there)
    folder = Path(cache or constants.HF_HUB_CACHE, f"{kind}s--{repository.replace('/', '--')}")
    blobs = folder / "blobs"
    root = folder / "snapshots" / str(info.sha)
    if lacking := [there[name] for name in files if not (root / name).is_file()]:
        # Another commit may have the same files.
        named = ((file.lfs.sha256 if file.lfs else file.blob_id or "", file.size or 0) for file in lacking)
        size = sum(size for name, size in named if not (blobs / name).is_file())
        check_room(folder, size, "free some space and try again, or name another disk with HF_HOME")
        with _progress(f"downloading {repository}", blobs, size):
            while True:
                before = _held(blobs)
                try:
                    download(allow_patterns=[glob.escape(one) for one in files])
                    break
                except (OSError, ValueError) as error:
                    if explain(error):
                        raise
                    # A connection that is cut is made again, and goes on where it was, as long as that brings more.
                    if _held(blobs) <= before:
                        raise WeightError(hub_reason(error, repository, revision, kind)) from error
    return root, files


def _fetch_from_modelscope(
    repository: str, choose: Choose, revision: str | None, kind: str, cache: str | None
) -> tuple[Path, list[str]]:
    """The same from ModelScope, by its own client, which has a cache and a progress bar."""
    try:
        from modelscope import snapshot_download
        from modelscope.hub.api import HubApi
    except ImportError as error:
        raise WeightError("ModelScope's client is not installed; pip install modelscope") from error
    if kind != "model":
        raise WeightError(f"a {kind} is taken from the Hugging Face hub or a folder; download it first")
    try:
        files = choose({one["Path"] for one in HubApi().get_model_files(repository, revision=revision, recursive=True)})
        patterns = [glob.escape(one) for one in files]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns)), files
    except UserError:
        raise
    except Exception as error:  # Its errors have no class of their own.
        raise WeightError(f"ModelScope does not give it ({next(iter(str(error).splitlines()), error)})") from error


def base_of_card(name: str) -> str | None:
    """The base model that an adapter's model card names, beside it or on the hub; None if nothing says one."""
    from huggingface_hub import ModelCard, hf_hub_download

    path, named = Path(name).expanduser(), _HUB_NAME.fullmatch(name)
    base = None
    with suppress(OSError, ValueError, TypeError, YAMLError):
        if os.path.exists(path):
            file = (path if path.is_dir() else path.parent) / CARD
        elif named:
            file = Path(hf_hub_download(named["repository"], CARD, revision=named["revision"]))
        else:
            return None
        base = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.get("base_model")
    return base if isinstance(base, str) and _HUB_NAME.fullmatch(base) else None


def _from_cache(download: Callable[..., str], choose: Choose, reason: str) -> tuple[Path, list[str]]:
    """What is in the hub's cache, where the hub does not answer for a reason."""
    try:
        root = Path(download(local_files_only=True))
    except (OSError, ValueError):
        raise WeightError(reason) from None
    try:
        return root, choose(_names_in(root))
    except WeightError as error:
        raise WeightError(f"{reason} (its copy in the cache is not whole: {error})") from error


def hub_reason(
    error: Exception, repository: str, revision: str | None = None, kind: str = "model", doing: str = "read"
) -> str:
    """Why the hub did not let somebody read or write something, and what to do about it."""
    from huggingface_hub import constants, errors

    hub, status = constants.ENDPOINT, getattr(getattr(error, "response", None), "status_code", None)
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    unknown = f"not on the hub, or private: check the spelling, or {log_in}"
    kinds: dict[type[Exception], str] = {
        errors.GatedRepoError: f"gated: accept its licence at {hub}/{repository}, and {log_in}",
        errors.RepositoryNotFoundError: f"removed; {_MOVED[repository]} is a copy" if repository in _MOVED else unknown,
        errors.RevisionNotFoundError: f"has no --revision {revision}; name a branch, tag or commit of it",
        errors.DisabledRepoError: f"closed by the hub; choose another {kind}",
        errors.HFValidationError: "not a name that the hub can have; these have the form owner/model",
    }
    for one, reason in kinds.items():
        if isinstance(error, one):
            return reason
    if status in (401, 403):
        refused = "does not know your token" if status == 401 else f"does not let your token {doing} it"
        return f"the hub {refused} ({status}): {log_in}, with a token that may {doing} it"
    if status == 429:
        return "the hub answered 429 (too many requests); wait some minutes and try again"
    if status:
        return f"the hub answered {status}; try again later"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"there is no token: {log_in}, with a token that may {doing} it"
    if constants.HF_HUB_OFFLINE and doing == "write":
        return "HF_HUB_OFFLINE forbids to upload it; unset that"
    if constants.HF_HUB_OFFLINE:
        return "not in the hub's cache, and HF_HUB_OFFLINE forbids to download it; unset that once"
    if isinstance(error, PermissionError):
        return f"{error.filename} cannot be written ({error.strerror}); name another folder with HF_HOME"
    return (
        f"the hub, {hub}, cannot be reached ({type(error.__cause__ or error).__name__}): check the network and "
        f"HTTPS_PROXY, name a mirror with HF_ENDPOINT, or copy the {kind} to this machine and name its folder"
    )


def _held(folder: Path) -> int:
    """Bytes of the files in a folder."""
    total = 0
    for path in folder.glob("*"):
        with suppress(OSError):  # One that has just been given its name.
            total += path.stat().st_size
    return total


@contextmanager
def _progress(what: str, folder: Path, size: int) -> Iterator[None]:
    """Inside, a progress bar of so many bytes follows the files in a folder as they grow, whatever writes them."""

    def watch() -> None:
        while not ended.wait(0.5):
            bar.update(min(_held(folder) - before, size) - bar.n)

    before, ended, watcher = _held(folder), Event(), Thread(target=watch, daemon=True)
    with tqdm(desc=what, total=size, unit="B", unit_scale=True) as bar:
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
        bar.update(size - bar.n)

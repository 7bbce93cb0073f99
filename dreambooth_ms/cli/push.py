"""`dreambooth-ms push`: the result of a run, its model card and pictures -> a repository on the Hugging Face hub."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from dreambooth_ms.atomic import write_bytes
from dreambooth_ms.cli.model_card import card_of, is_edited
from dreambooth_ms.cli.output import tell
from dreambooth_ms.cli.validation import FOLDER
from dreambooth_ms.config.commands import PushConfig
from dreambooth_ms.config.load import load
from dreambooth_ms.config.shared import HubConfig
from dreambooth_ms.errors import ConfigError, UserError, WeightError, count_of, near
from dreambooth_ms.formats.files.open import read_metadata
from dreambooth_ms.formats.folder_layout import INDEX, read_json
from dreambooth_ms.sampling.picture_file import png_of, read_pictures, validation_pictures
from dreambooth_ms.training.checkpoint import STEP_KEY, Result, result_of
from dreambooth_ms.training.run_folder import config_of_run
from dreambooth_ms.weights.hub import CARD, is_hub_name
from dreambooth_ms.weights.hub_upload import card_there, open_repository, upload


def run(argv: Sequence[str]) -> int:
    """Upload by a command line; returns the exit status."""
    config = load(PushConfig, argv, tell)
    folder = Path(config.publication.folder)
    _result_in(folder)
    push(folder, config.hub, repository_for(folder, config.hub))
    return 0


def repository_for(folder: Path, hub: HubConfig) -> str:
    """The repository that a run's folder is uploaded to, which its account may write to. Raises as `open_repository`,
    and ConfigError if the folder's name is no name for one."""
    name = hub.hub_model_id or folder.resolve().name
    if not hub.hub_model_id and not name.replace("-", "").replace(".", "").replace("_", "").isalnum():
        raise ConfigError(f"--hub_model_id: missing, and {name} is no name for a repository; give one, as owner/dog")
    return open_repository(name, hub.hub_token, hub.hub_private_repo)


def push(folder: Path, hub: HubConfig, repository: str) -> None:
    """Upload the result of a folder's run, its card and pictures, and nothing else. A card that a person edited, here
    or there, is kept. Raises WeightError, with the command that tries again, if it is not uploaded."""
    result, config = _result_in(folder), config_of_run(folder, "push the folder of a run")
    if config is None:
        raise WeightError(f"{folder}: has no config.yaml, by which its card is written; push the folder of a run")
    pictures = _pictures(folder, result.steps)
    card = card_of(repository, config, result, {name: text for name, (_, text) in pictures.items()})
    own = folder / CARD
    if own.is_file() and is_edited(here := own.read_text(encoding="utf-8")):
        tell(f"{own}: edited by hand, and uploaded as it is")
        card = here
    else:
        write_bytes(own, card.encode())
    files: dict[str, Path | bytes] = {**_files(folder, result), **{name: png for name, (png, _) in pictures.items()}}
    try:
        there = card_there(repository, hub.hub_token)
        if there is None or not is_edited(there) or is_edited(card):
            files[CARD] = card.encode()
        else:
            tell(f"{repository}: its {CARD} was edited by hand, and stays; that of this run is {own}")
        address = upload(repository, files, hub.hub_token)
    except UserError as error:
        again = shlex.join(["dreambooth-ms", "push", str(folder), "--hub_model_id", repository])
        raise WeightError(f"{error}; nothing is lost: {folder} has the result, `{again}` tries again") from error
    tell(f"uploaded {count_of(len(files), 'file')} to {address}")


def _result_in(folder: Path) -> Result:
    result = result_of(folder)
    if result is None:
        wrong = "holds no result of a training" if folder.is_dir() else f"no such folder{near(folder)}"
        raise WeightError(f"{folder}: {wrong}; name the --output_dir of one")
    return result


def _files(folder: Path, result: Result) -> dict[str, Path]:
    """What a result is made of: the parts of a model that its index names, or files of weights that the run wrote."""
    if (folder / INDEX).is_file():
        parts = [folder / name for name in read_json(folder / INDEX) if (folder / name).is_dir()]
        paths = [folder / INDEX, *(path for part in parts for path in sorted(part.rglob("*")) if path.is_file())]
    else:
        weights = (path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".bin"))
        paths = [path for path in weights if path == result.path or STEP_KEY in read_metadata(path)]
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _pictures(folder: Path, step: int) -> dict[str, tuple[bytes, str]]:
    """Those that were sampled last up to a step, by their names in the repository, with their prompts. Where on this
    machine the base is stays here."""
    steps = {own: paths for own, paths in validation_pictures(folder / FOLDER).items() if own <= step}
    found = {}
    for number, (picture, settings) in enumerate(read_pictures(steps[max(steps)] if steps else ())):
        if not is_hub_name(base := str(settings.get("pretrained_model_name_or_path"))):
            settings["pretrained_model_name_or_path"] = Path(base).name
        found[f"images/{number}.png"] = png_of(picture, settings), str(settings["prompt"])
    return found

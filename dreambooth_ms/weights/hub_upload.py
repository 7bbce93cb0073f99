"""Uploading to the Hugging Face hub: which repository may be written to, and files in one commit."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dreambooth_ms.errors import WeightError, show_names
from dreambooth_ms.weights.hub import CARD, hub_reason


def open_repository(name: str, token: str | None, private: bool) -> str:
    """The whole name of a repository that the token's account may write to, made if it is not there.

    A name without an owner is of the account itself; without a token it is that of the environment. Raises WeightError
    if the account is unknown or may not write there, or the hub does not answer.
    """
    from huggingface_hub import HfApi, constants

    api = HfApi(token=token or None)
    with _asking(name):
        account: dict[str, Any] = api.whoami()
    own, role = account["name"], account.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        place = f"{constants.ENDPOINT}/settings/tokens"
        raise WeightError(f"{name}: the token of {own} may only read; make one that may write, at {place}")
    owners = [own, *(one["name"] for one in account.get("orgs", ()))]
    owner, _, model = name.rpartition("/")
    if owner and owner not in owners:
        raise WeightError(f"{name}: {own} is not {owner}, nor one of its members; owners may be {show_names(owners)}")
    repository = f"{owner or own}/{model}"
    with _asking(repository):
        # Of one that is there, private or not, nothing changes.
        api.create_repo(repository, private=private or None, exist_ok=True)
    return repository


def card_there(repository: str, token: str | None) -> str | None:
    """The model card that a repository has; None if it has none. Raises WeightError if the hub does not answer."""
    from huggingface_hub import HfApi

    api = HfApi(token=token or None)
    with _asking(repository):
        if not api.file_exists(repository, CARD):
            return None
        return Path(api.hf_hub_download(repository, CARD)).read_text(encoding="utf-8")


def upload(repository: str, files: Mapping[str, Path | bytes], token: str | None) -> str:
    """Add files, by their names there, in one commit, those that are there as they are left out; returns the address of
    the repository. Raises WeightError if the hub refuses them, or does not answer; it has all of them or none then."""
    from huggingface_hub import CommitOperationAdd, HfApi, constants

    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    with _asking(repository):
        HfApi(token=token or None).create_commit(repository, operations, commit_message="Upload what was trained")
    return f"{constants.ENDPOINT}/{repository}"


@contextmanager
def _asking(repository: str) -> Iterator[None]:
    """Inside, what the hub does not do becomes a WeightError with the reason."""
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        # Of a large file that was not taken, and of one that is not in the cache, it says why in the cause.
        is_outer = isinstance(error, RuntimeError | FileNotFoundError) and isinstance(error.__cause__, Exception)
        cause = error.__cause__ if is_outer else error
        if isinstance(cause, OSError):
            raise WeightError(f"{repository}: {hub_reason(cause, repository, doing='write')}") from error
        raise WeightError(f"{repository}: the hub refuses it ({' '.join(str(cause).split())})") from error

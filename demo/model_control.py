"""Which model: one of those that are here, a path, or a name of the hub, which is fetched first."""

import re
import threading
from collections.abc import Sequence
from pathlib import Path

import streamlit as st
from huggingface_hub.constants import HF_HUB_CACHE

from demo import session
from demo.library import ModelFacts, Places, describe
from demo.processes import REPOSITORY
from dreambooth_ms.errors import UserError, explain
from dreambooth_ms.weights.hub import find_model

EMBEDDED = REPOSITORY / "checkpoints" / "tiny-shapes"
ADVISED = "stable-diffusion-v1-5/stable-diffusion-v1-5"
POLL_SECONDS = 1.0
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def model_control(label: str, key: str, places: Places, models: Sequence[Path]) -> ModelFacts | None:
    """The model that the widget with this key is set to; None if it cannot be used, and the page says why."""
    names = [str(path) for path in models]
    written = st.session_state[key].strip()
    # What the list shows may be written too.
    chosen = st.session_state[key] = {session.label(name): name for name in names}.get(written, written)
    st.selectbox(
        label,
        names if chosen in names else [*names, chosen],
        format_func=session.label,
        key=key,
        persist_state="session",
        accept_new_options=True,
        help=f"Found in {places.listed()}; or write a path there, or the name of a model on the Hugging Face hub.",
    )
    if chosen not in names and _HUB_NAME.fullmatch(chosen) and not Path(chosen).exists():
        download = downloads().get(chosen)
        if download is None or download.path is None:
            _fetch(chosen)
            return None
        chosen = str(download.path)
    try:
        return describe(places.confined(chosen))
    except UserError as error:
        session.show_error(error)
        return None


class _Download(threading.Thread):
    """A model that is on its way from the hub into its cache. It ends with the server, and can be taken up again."""

    def __init__(self, name: str) -> None:
        super().__init__(daemon=True, name=name)
        self.path: Path | None = None
        self.error = ""
        self.start()

    def run(self) -> None:
        try:
            self.path = find_model(self.name)
        except (UserError, OSError) as error:
            self.error = explain(error) or str(error)

    @property
    def gigabytes(self) -> float:
        """What is here so far."""
        files = Path(HF_HUB_CACHE, f"models--{self.name.replace('/', '--')}", "blobs").glob("*")
        return sum(file.stat().st_size for file in files if file.exists()) / 1e9


@st.cache_resource
def downloads() -> dict[str, _Download]:
    """By name, for all windows."""
    return {}


@st.fragment(run_every=POLL_SECONDS)
def _fetch(name: str) -> None:
    """Offer to fetch a model of the hub, or show how far that is."""
    download = downloads().get(name)
    if download and download.path:
        st.rerun()
    if download and download.is_alive():
        st.info(f"Fetching {name}: {download.gigabytes:.2f} GB are here.", icon=":material/cloud_download:")
        return
    st.info(f"{name} is not on this machine; the Hugging Face hub may have it.", icon=":material/cloud_download:")
    st.button("Download", key=f"fetch {name}", on_click=lambda: downloads().update({name: _Download(name)}))
    if download and download.error:
        session.show_error(download.error)


def advise(key: str) -> None:
    """Tell a newcomer, before any work, that the embedded base is not for photographs, and lead to one that is."""
    st.info(
        "tiny-shapes knows flat shapes only: circle, square, triangle, star, heart and cross. Try the page out with "
        "it; it cannot learn a dog or a face. For photographs take a base that knows such things, as Stable Diffusion "
        "1.5 does (a download of about 4 GB; without an Ascend card its training takes hours).",
        icon=":material/interests:",
    )
    st.button("Take Stable Diffusion 1.5", on_click=st.session_state.update, kwargs={key: ADVISED}, key="advised")

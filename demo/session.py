"""What belongs to the server, and what to one browser window."""

import argparse
import atexit
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import Any

import streamlit as st
from huggingface_hub.constants import HF_HUB_CACHE

from demo import engine as engines
from demo.engine import Engine, Job
from demo.gallery import Entry
from demo.library import Places
from demo.messages import PictureRequest
from demo.processes import REPOSITORY
from dreambooth_ms.errors import UserError

LOCAL = ("127.0.0.1", "localhost", "::1")
PAGES: dict[str, Any] = {}
"""The pages by name, for links between them."""
WINDOWS, LEFT_SECONDS = 8, 3.0
"""How many windows are remembered, and for how long nobody looks at a drawing that is shown to the next who comes."""


def check_server() -> None:
    """End the page with a sentence if others than this machine's user can reach it."""
    address = st.get_option("server.address")
    if address not in LOCAL:
        st.error(
            f"This page runs programs for whoever opens it, and its server listens on {address or 'every address'}. "
            "Start it with `--server.address 127.0.0.1`, and reach it from elsewhere through an SSH tunnel: "
            "`ssh -L 8501:127.0.0.1:8501 HOST`."
        )
        st.stop()


def places() -> Places:
    """The folders on the page's command line, after `--`."""
    parser = argparse.ArgumentParser(prog="streamlit run demo/sampling.py --", description="Generate and teach.")
    parser.add_argument("--folder", action="append", type=Path, default=[], help="more models, LoRAs, photographs")
    parser.add_argument("--runs", type=Path, default=REPOSITORY / "runs", help="where trainings are written")
    arguments, _ = parser.parse_known_args(sys.argv[1:])
    own = [REPOSITORY / "checkpoints", REPOSITORY / "demo" / "subject"]
    return Places.of([*own, *arguments.folder, Path(HF_HUB_CACHE)], arguments.runs)


@st.cache_resource
def engine() -> Engine:
    """The one engine of the server."""
    return Engine(engines.WORKER)


@st.cache_resource
def _server_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="dreambooth-ms-page-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@dataclass(eq=False)
class Window:
    """What of a browser window is still there when its page is loaded again."""

    name: str
    """Stands in the page's address."""
    job: Job | None = None
    """The newest request."""
    collected: int = 0
    """The number of the request whose pictures came into the gallery last."""
    gallery: list[Entry] = field(default_factory=list)
    loras: list[str] = field(default_factory=list)
    """Uploaded ones."""

    def submit(self, request: PictureRequest) -> None:
        """Ask the engine for pictures; raises QueueFullError. From then on the window is remembered."""
        self.job = engine().submit(request)
        if self not in windows():
            windows().append(self)


@st.cache_resource
def windows() -> deque[Window]:
    """The windows that have asked for pictures, as many as are remembered."""
    return deque(maxlen=WINDOWS)


def window() -> Window:
    """This session's: that of its address, or one that nobody looks at while it is drawn for, or a new one."""
    state = st.session_state
    if "window" not in state:
        mine = [one for one in windows() if one.name == st.query_params.get("window")]
        left = [one for one in windows() if one.job and not one.job.over and one.job.unwatched > LEFT_SECONDS]
        state.window = [Window(token_hex(8)), *left, *mine][-1]
    return state.window


def upload_folder() -> Path:
    """Where this session's uploads are until the server ends."""
    if "upload_folder" not in st.session_state:
        st.session_state.upload_folder = Path(tempfile.mkdtemp(dir=_server_folder()))
    return st.session_state.upload_folder


def label(name: str) -> str:
    """A model, LoRA or folder as the page calls it."""
    path = Path(name)
    if not path.is_absolute():  # As it was written, or a name of the hub.
        return name
    return f"{path.name} (uploaded)" if path.is_relative_to(_server_folder()) else places().label(path)


@contextmanager
def sentences() -> Iterator[None]:
    """Inside, a user's mistake becomes a sentence on the page."""
    try:
        yield
    except UserError as error:
        show_error(error)


def show_error(error: UserError | str) -> None:
    """Show what is wrong, without a traceback."""
    st.error(str(error), icon=":material/error:")


STYLE = """
<style>
  .block-container { padding-top: 4.2rem; padding-bottom: 3rem; max-width: 1500px; }
  [data-testid="stImage"] img { border-radius: .5rem; }
  [data-testid="stSidebarUserContent"] { padding-top: .5rem; }
  .st-key-narrow { display: none; }
  @media (max-width: 768px) { .st-key-narrow { display: flex; } }
  @media (max-width: 640px) {
    .block-container { padding-left: 1rem; padding-right: 1rem; }
    button kbd { display: none !important; }
  }
</style>
"""

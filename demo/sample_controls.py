"""The side of the page to generate on: which networks, and how they sample."""

import os
import re
from dataclasses import replace
from pathlib import Path

import streamlit as st

from demo import session, uploads
from demo.library import ModelFacts, Shelf, choose, describe, find_followers, kind_of
from demo.messages import ModelChoice, PictureRequest
from dreambooth_ms.config.choices import SamplingScheduler
from dreambooth_ms.errors import ConfigError, UserError
from dreambooth_ms.models.specs import Family
from dreambooth_ms.weights.hub import find_adapter

SCHEDULERS: dict[SamplingScheduler, str] = {
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_a": "Euler ancestral",
    "dpm++_2m": "DPM++ 2M",
    "dpm++_2m_karras": "DPM++ 2M Karras",
    "dpm++_2s": "DPM++ 2S",
    "dpm++_sde": "DPM++ SDE",
    "unipc": "UniPC",
    "heun": "Heun",
    "lms": "LMS",
    "pndm": "PNDM",
    "deis": "DEIS",
    "lcm": "LCM",
    "ddpm": "DDPM",
}
"""As the page calls them; the page takes no models of EDM's formulation, so none of their schedulers."""
LARGEST_SEED = 2**31 - 1
_HUB_LORA = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*){1,3}")


def controls(facts: ModelFacts, shelf: Shelf) -> PictureRequest:
    """The request that is set up at the side, without prompts and picture."""
    loras, scales = _loras(shelf)
    embeddings = _embeddings(shelf)
    _lora_upload()
    refiner, refiner_start = _follower(facts, shelf)
    request = _settings(facts)
    model = choose(str(facts.path), loras, refiner, embeddings)
    return replace(request, model=model, lora_scales=scales, refiner_start=refiner_start)


def _loras(shelf: Shelf) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The adapters and their strengths."""
    state = st.session_state
    names = [str(path) for path in shelf.loras] + [name for name in session.window().loras if not _is_embedding(name)]
    loras = _chosen("LoRAs", "sample_loras", names, state.pop("add_lora", None))
    return loras, tuple(_strength(name) for name in loras)


def _embeddings(shelf: Shelf) -> tuple[str, ...]:
    """The embeddings of new words; the field is there if any are."""
    state = st.session_state
    names = [str(path) for path in shelf.embeddings] + [name for name in session.window().loras if _is_embedding(name)]
    if not names:
        state.sample_embeddings = []
        return ()
    meaning = "New words that were learnt without a LoRA. Buttons under the prompt write them."
    return _chosen("Embeddings", "sample_embeddings", names, state.pop("add_embedding", None), meaning)


def _chosen(label: str, key: str, names: list[str], more: str | None, meaning: str | None = None) -> tuple[str, ...]:
    """What is chosen of these files and folders, with one more that has just come."""
    state = st.session_state
    wanted = [*state.get(key, []), *filter(None, [more])]
    state[key] = [name for name in dict.fromkeys(wanted) if name in names]
    chosen = st.multiselect(
        label, names, format_func=session.label, key=key, persist_state="session", placeholder="None", help=meaning
    )
    return tuple(name for name in chosen if name in names)


def _is_embedding(path: str) -> bool:
    """Whether an upload or a file of the hub holds new words alone."""
    return kind_of(Path(path)) == "words"


def _strength(lora: str) -> float:
    key = f"scale {lora}"
    st.session_state.setdefault(key, 1.0)
    return st.slider(f"Strength of {session.label(lora)}", 0.0, 1.5, step=0.05, key=key, persist_state="session")


def _lora_upload() -> None:
    state = st.session_state
    with st.popover("Add a LoRA or an embedding", icon=":material/upload:", width="stretch"):
        file = st.file_uploader(
            "LoRA or embedding",
            type=uploads.LORA_TYPES,
            key="lora_upload",
            label_visibility="collapsed",
            max_upload_size=uploads.MAX_LORA_BYTES // uploads.MEGABYTE,
        )
        if file and state.get("last_lora") != file.file_id:
            state.last_lora, state.lora_error = file.file_id, _keep_lora(file.name, file.getvalue())
        if file and state.lora_error:
            session.show_error(state.lora_error)
        name = st.text_input("Or from the Hugging Face hub", placeholder="owner/name", key="hub_lora").strip()
        if st.button("Fetch", key="fetch_lora", disabled=not name):
            with st.spinner(f"Fetching {name}"), session.sentences():
                _choose_lora(_of_hub(name))
    if "add_lora" in state or "add_embedding" in state:
        st.rerun()


def _keep_lora(name: str, content: bytes) -> str:
    """Store an uploaded LoRA and choose it; or what is wrong with it."""
    try:
        _choose_lora(str(uploads.store_lora(session.upload_folder(), name, content)))
    except UserError as error:
        return str(error)
    return ""


def _of_hub(name: str) -> str:
    """The path of an adapter of the hub, fetched if it is not here.

    Raises:
        UserError: no such name, or the hub does not give it. A path is no name: the page reads its own folders only.
    """
    if not _HUB_LORA.fullmatch(name) or os.path.exists(name):
        raise ConfigError(f"{name}: expected owner/name or owner/name/file of the Hugging Face hub")
    return str(find_adapter(name))


def _choose_lora(path: str) -> None:
    window = session.window()
    window.loras = sorted({*window.loras, path})
    st.session_state["add_embedding" if _is_embedding(path) else "add_lora"] = path


def _follower(facts: ModelFacts, shelf: Shelf) -> tuple[str | None, float]:
    """The model that finishes or enlarges the pictures, and from where on."""
    followers = {str(path): describe(path) for path in find_followers(facts, shelf)}
    if not followers:
        return None, PictureRequest.refiner_start
    refiner = st.selectbox(
        "Second stage" if facts.family is Family.IF else "Refiner",
        [None, *followers],
        format_func=lambda name: session.label(name) if name else "None",
        key="sample_refiner",
        persist_state="session",
    )
    start = PictureRequest.refiner_start
    if refiner and not followers[refiner].enlarges:
        start = st.slider(
            "The refiner takes over after", 0.5, 0.95, step=0.05, key="sample_refiner_start", persist_state="session"
        )
    return refiner, start


def _settings(facts: ModelFacts) -> PictureRequest:
    """How it is sampled."""
    state, sizes = st.session_state, facts.sizes()
    if state.get("sample_size") not in sizes:
        state.sample_size = "Square"
    if state.get("sample_guidance_of") != str(facts.path):
        state.sample_guidance_of, state.sample_guidance = str(facts.path), facts.guidance
    size = st.selectbox(
        "Size",
        list(sizes),
        format_func=lambda name: f"{name}  {sizes[name][0]} × {sizes[name][1]}",
        key="sample_size",
        persist_state="session",
    )
    left, right = st.columns(2)
    steps = left.number_input("Steps", 1, 200, key="sample_steps", persist_state="session")
    count = right.number_input("Pictures", 1, 16, key="sample_count", persist_state="session")
    guidance = st.slider(
        "Guidance",
        1.0,
        15.0,
        step=0.5,
        format="%.1f",
        key="sample_guidance",
        persist_state="session",
        help="How closely to follow the prompt; 1 turns it off.",
    )
    scheduler = st.selectbox(
        "Scheduler",
        list(SCHEDULERS),
        format_func=SCHEDULERS.__getitem__,
        key="sample_scheduler",
        persist_state="session",
    )
    seed = st.number_input(
        "Seed",
        0,
        LARGEST_SEED,
        key="sample_seed",
        persist_state="session",
        help="The same seed generates the same picture.",
    )
    st.toggle("A new seed each time", key="sample_random_seed", persist_state="session")
    width, height = sizes[size]
    return PictureRequest(
        model=ModelChoice(str(facts.path)),
        prompt="",
        scheduler=scheduler,
        num_inference_steps=int(steps),
        guidance_scale=float(guidance),
        seed=int(seed),
        width=width,
        height=height,
        count=int(count),
    )

"""The page to generate on: prompt and picture in the middle, the model and how it samples at the side."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st
from PIL import Image, ImageOps

from demo import session, uploads
from demo.library import ModelFacts, Places, Shelf, find, newest_run, read_run, words_of
from demo.messages import PictureRequest
from demo.model_control import EMBEDDED, model_control
from demo.sample_controls import LARGEST_SEED, controls
from demo.sample_view import show_gallery, show_result, use_again
from demo.tokens import MOST, count_tokens
from dreambooth_ms.errors import UserError

FIRST_PROMPT = "a photo of a red circle on a blue background"
FIRST_VALUES = {
    "sample_steps": PictureRequest.num_inference_steps,
    "sample_count": PictureRequest.count,
    "sample_scheduler": PictureRequest.scheduler,
    "sample_seed": PictureRequest.seed,
    "sample_strength": PictureRequest.strength,
    "sample_mask_strength": 1.0,
    "sample_refiner_start": PictureRequest.refiner_start,
    "sample_negative_prompt": "",
    "sample_compare": False,
    "sample_random_seed": False,
}
"""Of the widgets with these keys. They stand in the state, because "use again" sets them there."""


def show() -> None:
    """Show the page."""
    st.html(session.STYLE)
    places = session.places()
    shelf = find(places)
    if not shelf.models:
        session.show_error(f"There is no model in {places.listed()}; start the page with `-- --folder DIR`.")
        return
    _set_first_values(places, shelf)
    with st.sidebar:
        facts = model_control("Model", "sample_model", places, shelf.models)
        if facts and facts.path == EMBEDDED:
            st.caption("It knows flat shapes only. For other bases, write a name of the Hugging Face hub here.")
        request = controls(facts, shelf) if facts else None
    if facts and request:
        _prompt(facts, request)
        left, right = st.columns(2)
        with left:
            _negative_prompt(facts)
        with right:
            request = _picture_to_start_from(request, facts)
        _button(request)
        _show_networks(request)
    show_result()
    show_gallery()


def _set_first_values(places: Places, shelf: Shelf) -> None:
    """What a newcomer finds: the newest run on its base, otherwise the embedded base; and who loads the page again,
    the settings of the pictures that were asked for last.
    """
    state = st.session_state
    for name, value in FIRST_VALUES.items():
        state.setdefault(name, value)
    handed_over = state.pop("sample_with_run", None)
    if "sample_model" in state and not handed_over:
        return
    job = session.window().job
    if job and not handed_over:
        use_again(job.request)
        return
    result = Path(handed_over) if handed_over else None
    run = read_run(result) if result else newest_run(places, shelf)
    base = Path(run.base).resolve() if run else None
    if run and result in shelf.models:
        state.sample_model, state.sample_loras, state.sample_prompt = str(result), [], run.instance_prompt
    elif run and base in shelf.models:
        state.sample_model, state.sample_prompt, own = str(base), run.instance_prompt, [str(run.folder)]
        is_of_words = run.folder in shelf.embeddings
        state.sample_loras, state.sample_embeddings = ([], own) if is_of_words else (own, [])
        state.sample_compare = not is_of_words
    elif "sample_model" not in state:
        first = EMBEDDED if EMBEDDED in shelf.models else shelf.models[0]
        state.sample_model, state.sample_loras = str(first), []
        state.sample_prompt = FIRST_PROMPT if first == EMBEDDED else ""


def _prompt(facts: ModelFacts, request: PictureRequest) -> None:
    prompt = st.text_area("Prompt", key="sample_prompt", persist_state="session", height=84)
    sources = [*request.model.loras, *request.model.embeddings]
    words = list(dict.fromkeys(word for source in sources for word in words_of(Path(source))))
    if words:
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            st.caption("New words", width="content")
            for word in words:
                # As code: in Markdown, <new1> would be a tag.
                st.button(f"`{word}`", key=f"word {word}", on_click=_write_word, args=(word,), help="Write it")
    _show_length(prompt, facts)


def _write_word(word: str) -> None:
    """Put a word behind the prompt."""
    state = st.session_state
    state.sample_prompt = f"{state.sample_prompt.rstrip()} {word}".lstrip()


def _negative_prompt(facts: ModelFacts) -> None:
    with st.expander("Negative prompt"):
        negative = st.text_area(
            "Negative prompt",
            key="sample_negative_prompt",
            persist_state="session",
            height=68,
            label_visibility="collapsed",
            placeholder="What to keep away from",
        )
        _show_length(negative, facts)


def _picture_to_start_from(request: PictureRequest, facts: ModelFacts) -> PictureRequest:
    """The request with the picture that it starts from, if there is one; a model that inpaints needs a mask of it, and
    a second stage enlarges it."""
    inpaints, enlarges, strength = facts.inpaints, facts.enlarges, PictureRequest.strength
    name, key = ("Draw a part of a picture anew", "_mask") if inpaints else ("Start from a picture", "")
    name = "The small picture to enlarge" if enlarges else name
    with st.expander(name, expanded=inpaints or enlarges or bool(st.session_state.get("sample_picture"))):
        left, right = st.columns([2, 1], vertical_alignment="center")
        with left:
            picture = _uploader("Picture", "sample_picture", shows_label=inpaints)
            own_mask = _uploader("Mask, white where it is drawn anew", "sample_mask") if inpaints else None
            if not enlarges:
                strength = st.slider(
                    "How far to go from it", 0.05, 1.0, step=0.05, key=f"sample{key}_strength", persist_state="session"
                )
        try:
            image, mask = _read(picture, "white"), _read(own_mask, "black")
        except UserError as error:
            session.show_error(error)
            return request
        if inpaints and (image is None or mask is None or mask.size != image.size):
            left.caption("Give a picture, and a mask of the same size. Without them all of a picture is generated.")
            return request
        if image is None:
            if enlarges:
                left.caption("This model enlarges pictures: give one, or choose it behind a first stage.")
            return request
        size = request.width, request.height
        shown = fitted = image if enlarges else ImageOps.fit(image, size, Image.Resampling.LANCZOS)
        request = replace(request, image=np.asarray(fitted), strength=strength)
        if mask is not None:
            mask = ImageOps.fit(mask, size, Image.Resampling.LANCZOS)
            shown = Image.composite(Image.new("RGB", size, "red"), fitted, mask.convert("L"))
            request = replace(request, mask=np.asarray(mask))
        right.image(shown, width="stretch", caption="Red is drawn anew" if inpaints else "As it will be used")
    return request


def _uploader(label: str, key: str, shows_label: bool = True) -> Any:
    """The widget with this key, for a picture: what it was given."""
    return st.file_uploader(
        label,
        type=uploads.PICTURE_TYPES,
        key=key,
        label_visibility="visible" if shows_label else "collapsed",
        max_upload_size=uploads.MAX_PICTURE_BYTES // uploads.MEGABYTE,
    )


def _read(file: Any, background: str) -> Image.Image | None:
    """What was uploaded, if anything was, on a background; UserError if it is no picture."""
    return uploads.read_picture(session.upload_folder(), file.name, file.getvalue(), background) if file else None


def _button(request: PictureRequest) -> None:
    job = session.window().job
    busy = job is not None and not job.over
    with st.container(horizontal=True, vertical_alignment="center"):
        st.button(
            "Generate",
            type="primary",
            icon=":material/brush:",
            disabled=busy,
            key="sample_button",
            on_click=_submit,
            args=(request,),
            shortcut="Ctrl+Enter",
        )
        st.toggle(
            "Compare with the model alone",
            key="sample_compare",
            persist_state="session",
            disabled=not request.model.loras,
            help="Generates each picture a second time from the same seed, without the LoRAs.",
        )


def _show_networks(request: PictureRequest) -> None:
    """One line on what will be sampled with: on a phone the settings are out of sight."""
    model = request.model
    networks = [session.label(model.base), *map(session.label, (*model.loras, *model.embeddings))]
    networks += [session.label(model.refiner)] if model.refiner else []
    start = " from your picture" if request.image is not None else ""
    st.caption(f"{' + '.join(networks)}, {request.width} × {request.height}{start}")


def _show_length(prompt: str, facts: ModelFacts) -> None:
    tokens = count_tokens(prompt, facts.tokenizer)
    if tokens > MOST:
        st.caption(f":red[{tokens} of {MOST} tokens: only the first {MOST} are read.]")
    elif tokens:
        st.caption(f"{tokens} of {MOST} tokens")


def _submit(request: PictureRequest) -> None:
    """Hand a request to the engine, with what the widgets of the middle say at the click."""
    state = st.session_state
    if state.sample_random_seed:
        state.sample_seed = random.randrange(LARGEST_SEED)
    request = replace(
        request,
        seed=state.sample_seed,
        prompt=state.sample_prompt,
        negative_prompt=state.sample_negative_prompt,
        compare=state.sample_compare and bool(request.model.loras),
    )
    state.sample_error = ""
    if not request.prompt.strip():
        state.sample_error = "Write a prompt first: what shall be on the picture?"
        return
    try:
        session.window().submit(request)
    except UserError as error:
        state.sample_error = str(error)

"""The page to draw on: prompt and picture in the middle, the model and how it draws at the side."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import streamlit as st
from PIL import Image, ImageOps

from demo import session, uploads
from demo.draw_controls import LARGEST_SEED, controls, model_control
from demo.draw_view import show_gallery, show_result
from demo.engine import Job
from demo.library import ModelFacts, Places, Shelf, find, newest_run, read_run
from demo.messages import Drawing
from demo.processes import REPOSITORY
from demo.tokens import MOST, count_tokens
from dreambooth_ms.errors import UserError

FIRST_MODEL = REPOSITORY / "checkpoints" / "tiny-shapes"
FIRST_PROMPT = "a photo of a red circle on a blue background"
FIRST_VALUES = {
    "draw_steps": Drawing.num_inference_steps,
    "draw_count": Drawing.count,
    "draw_scheduler": Drawing.scheduler,
    "draw_seed": Drawing.seed,
    "draw_strength": Drawing.strength,
    "draw_refiner_start": Drawing.refiner_start,
    "draw_negative_prompt": "",
    "draw_compare": False,
    "draw_random_seed": False,
}
"""Of the widgets with these keys. They stand in the state, because "use again" sets them there."""


def show() -> None:
    """Draw the page."""
    st.html(session.STYLE)
    places = session.places()
    shelf = find(places)
    if not shelf.models:
        session.tell_error(f"There is no model in {places.listed()}; start the page with `-- --folder DIR`.")
        return
    _set_first_values(places, shelf)
    with st.sidebar:
        facts = model_control(places, shelf)
        if facts is None:
            return
        drawing = controls(facts, shelf)
    _prompt(facts)
    left, right = st.columns(2)
    with left:
        _negative_prompt(facts)
    with right:
        drawing = _picture_to_start_from(drawing)
    _button(drawing)
    _tell_drawing(drawing)
    show_result()
    show_gallery()


def _set_first_values(places: Places, shelf: Shelf) -> None:
    """What a newcomer finds: the newest run on its base, otherwise the embedded base."""
    state = st.session_state
    for name, value in FIRST_VALUES.items():
        state.setdefault(name, value)
    handed_over = state.pop("draw_with_run", None)
    if "draw_model" in state and not handed_over:
        return
    result = Path(handed_over) if handed_over else None
    run = read_run(result) if result else newest_run(places, shelf)
    base = Path(run.base).resolve() if run else None
    if run and result in shelf.models:
        state.draw_model, state.draw_loras, state.draw_prompt = str(result), [], run.instance_prompt
    elif run and base in shelf.models:
        state.draw_model, state.draw_loras, state.draw_prompt = str(base), [str(run.folder)], run.instance_prompt
        state.draw_compare = True
    elif "draw_model" not in state:
        first = FIRST_MODEL if FIRST_MODEL in shelf.models else shelf.models[0]
        state.draw_model, state.draw_loras = str(first), []
        state.draw_prompt = FIRST_PROMPT if first == FIRST_MODEL else ""


def _prompt(facts: ModelFacts) -> None:
    prompt = st.text_area("Prompt", key="draw_prompt", persist_state="session", height=84)
    _tell_length(prompt, facts)


def _negative_prompt(facts: ModelFacts) -> None:
    with st.expander("Negative prompt"):
        negative = st.text_area(
            "Negative prompt",
            key="draw_negative_prompt",
            persist_state="session",
            height=68,
            label_visibility="collapsed",
            placeholder="What to keep away from",
        )
        _tell_length(negative, facts)


def _picture_to_start_from(drawing: Drawing) -> Drawing:
    """The drawing with the picture that it starts from, if there is one."""
    with st.expander("Start from a picture", expanded=bool(st.session_state.get("draw_picture"))):
        left, right = st.columns([2, 1], vertical_alignment="center")
        file = left.file_uploader(
            "Picture",
            type=uploads.PICTURE_TYPES,
            key="draw_picture",
            label_visibility="collapsed",
            max_upload_size=uploads.MAX_PICTURE_BYTES // uploads.MEGABYTE,
        )
        strength = left.slider(
            "How far to go from it", 0.05, 1.0, step=0.05, key="draw_strength", persist_state="session"
        )
        if file is None:
            return drawing
        try:
            image = uploads.read_picture(session.upload_folder(), file.name, file.getvalue())
        except UserError as error:
            session.tell_error(error)
            return drawing
        fitted = ImageOps.fit(image, (drawing.width, drawing.height), Image.Resampling.LANCZOS)
        right.image(fitted, width="stretch", caption="As it will be used")
    return replace(drawing, image=np.asarray(fitted), strength=strength)


def _button(drawing: Drawing) -> None:
    job: Job | None = st.session_state.get("job")
    busy = job is not None and not job.over
    with st.container(horizontal=True, vertical_alignment="center"):
        st.button(
            "Draw",
            type="primary",
            icon=":material/brush:",
            disabled=busy,
            key="draw_button",
            on_click=_submit,
            args=(drawing,),
            shortcut="Ctrl+Enter",
        )
        st.toggle(
            "Compare with the model alone",
            key="draw_compare",
            persist_state="session",
            disabled=not drawing.model.loras,
            help="Draws each picture a second time from the same seed, without the LoRAs.",
        )


def _tell_drawing(drawing: Drawing) -> None:
    """One line on what will be drawn with: on a phone the settings are out of sight."""
    model = drawing.model
    networks = [session.label(model.base), *map(session.label, model.loras)]
    networks += [session.label(model.refiner)] if model.refiner else []
    start = " from your picture" if drawing.image is not None else ""
    st.caption(f"{' + '.join(networks)}, {drawing.width} × {drawing.height}{start}")


def _tell_length(prompt: str, facts: ModelFacts) -> None:
    tokens = count_tokens(prompt, facts.tokenizer)
    if tokens > MOST:
        st.caption(f":red[{tokens} of {MOST} tokens: the last {tokens - MOST} are not read.]")
    elif tokens:
        st.caption(f"{tokens} of {MOST} tokens")


def _submit(drawing: Drawing) -> None:
    """Hand a drawing to the engine, with what the widgets of the middle say at the click."""
    state = st.session_state
    if state.draw_random_seed:
        state.draw_seed = random.randrange(LARGEST_SEED)
    drawing = replace(
        drawing,
        seed=state.draw_seed,
        prompt=state.draw_prompt,
        negative_prompt=state.draw_negative_prompt,
        compare=state.draw_compare and bool(drawing.model.loras),
    )
    state.draw_error = ""
    if not drawing.prompt.strip():
        state.draw_error = "Write a prompt first: what shall be on the picture?"
        return
    try:
        state.job = session.engine().submit(drawing)
    except UserError as error:
        state.draw_error = str(error)

"""The page to draw on: prompt and picture in the middle, the model and how it draws at the side."""

import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import streamlit as st
from PIL import Image, ImageOps

from demo import gallery, session, uploads
from demo.engine import Job
from demo.gallery import Entry
from demo.library import ModelFacts, Places, Shelf, choose, describe, find, find_refiners, newest_run, read_run
from demo.messages import Drawing, ModelChoice
from demo.processes import REPOSITORY
from demo.tokens import MOST, count_tokens
from dreambooth_ms.config.schema import SamplingScheduler
from dreambooth_ms.errors import UserError
from dreambooth_ms.models.specs import Family

FIRST_MODEL = REPOSITORY / "checkpoints" / "tiny-shapes"
FIRST_PROMPT = "a photo of a red circle on a blue background"
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
"""As the page calls them; those for models of EDM's formulation are for none that is drawn with here."""
LARGEST_SEED = 2**31 - 1
FIRST_VALUES = {
    "draw_steps": Drawing.num_inference_steps,
    "draw_count": Drawing.count,
    "draw_scheduler": Drawing.scheduler,
    "draw_seed": Drawing.seed,
    "draw_strength": Drawing.strength,
    "draw_refiner_start": Drawing.refiner_start,
    "draw_negative_prompt": "",
}
"""Of the widgets with these keys. They stand in the state, because "use again" sets them there."""
POLL_SECONDS = 0.4


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
        facts = _model(places, shelf)
        if facts is None:
            return
        loras, scales = _loras(shelf)
        refiner, refiner_start = _refiner(facts, shelf)
        drawing = _settings(facts, choose(str(facts.path), loras, refiner))
    drawing = replace(drawing, lora_scales=scales, refiner_start=refiner_start)
    _prompt(facts)
    left, right = st.columns(2)
    with left:
        _negative_prompt(facts)
    with right:
        drawing = _picture_to_start_from(drawing)
    _button(drawing)
    _tell_drawing(drawing)
    _result()
    _gallery()


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


def _model(places: Places, shelf: Shelf) -> ModelFacts | None:
    """The base; None if it cannot be used, and the page says why."""
    names, chosen = [str(path) for path in shelf.models], st.session_state.draw_model
    st.selectbox(
        "Model",
        names if chosen in names else [*names, chosen],
        format_func=session.label,
        key="draw_model",
        persist_state="session",
        accept_new_options=True,
        help=f"Found in {places.listed()}; or write the path of a file or folder there.",
    )
    try:
        return describe(places.confined(st.session_state.draw_model))
    except UserError as error:
        session.tell_error(error)
        return None


def _loras(shelf: Shelf) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The adapters and their strengths."""
    state = st.session_state
    names = [str(path) for path in shelf.loras] + state.setdefault("uploaded_loras", [])
    wanted = [*state.get("draw_loras", []), *filter(None, [state.pop("add_lora", None)])]
    state.draw_loras = [name for name in dict.fromkeys(wanted) if name in names]
    loras = st.multiselect(
        "LoRAs", names, format_func=session.label, key="draw_loras", persist_state="session", placeholder="None"
    )
    loras = [name for name in loras if name in names]
    scales = tuple(_strength(name) for name in loras)
    _lora_upload()
    return tuple(loras), scales


def _strength(lora: str) -> float:
    key = f"scale {lora}"
    st.session_state.setdefault(key, 1.0)
    return st.slider(f"Strength of {session.label(lora)}", 0.0, 1.5, step=0.05, key=key, persist_state="session")


def _refiner(facts: ModelFacts, shelf: Shelf) -> tuple[str | None, float]:
    """The model that finishes the pictures, and from where on."""
    refiners = [str(path) for path in find_refiners(shelf)] if facts.family is Family.SDXL else []
    if not refiners:
        return None, Drawing.refiner_start
    refiner = st.selectbox(
        "Refiner",
        [None, *refiners],
        format_func=lambda name: session.label(name) if name else "None",
        key="draw_refiner",
        persist_state="session",
    )
    start = Drawing.refiner_start
    if refiner:
        start = st.slider(
            "The refiner takes over after", 0.5, 0.95, step=0.05, key="draw_refiner_start", persist_state="session"
        )
    return refiner, start


def _lora_upload() -> None:
    with st.popover("Upload a LoRA", icon=":material/upload:", width="stretch"):
        file = st.file_uploader(
            "LoRA",
            type=uploads.LORA_TYPES,
            key="lora_upload",
            label_visibility="collapsed",
            max_upload_size=uploads.MAX_LORA_BYTES // uploads.MEGABYTE,
        )
    if file is None or st.session_state.get("last_lora") == file.file_id:
        return
    st.session_state.last_lora = file.file_id
    with session.sentences():
        path = str(uploads.store_lora(session.upload_folder(), file.name, file.getvalue()))
        known = st.session_state.setdefault("uploaded_loras", [])
        if path not in known:
            known.append(path)
            st.session_state.add_lora = path
            st.rerun()


def _settings(facts: ModelFacts, model: ModelChoice) -> Drawing:
    """How it is drawn."""
    state, sizes = st.session_state, facts.sizes()
    if state.get("draw_size") not in sizes:
        state.draw_size = "Square"
    if state.get("draw_guidance_of") != str(facts.path):
        state.draw_guidance_of, state.draw_guidance = str(facts.path), facts.guidance
    size = st.selectbox(
        "Size",
        list(sizes),
        format_func=lambda name: f"{name}  {sizes[name][0]} × {sizes[name][1]}",
        key="draw_size",
        persist_state="session",
    )
    left, right = st.columns(2)
    steps = left.number_input("Steps", 1, 200, key="draw_steps", persist_state="session")
    count = right.number_input("Pictures", 1, 16, key="draw_count", persist_state="session")
    guidance = st.slider(
        "Guidance",
        1.0,
        15.0,
        step=0.5,
        format="%.1f",
        key="draw_guidance",
        persist_state="session",
        help="How closely to follow the prompt; 1 turns it off.",
    )
    scheduler = st.selectbox(
        "Scheduler", list(SCHEDULERS), format_func=SCHEDULERS.__getitem__, key="draw_scheduler", persist_state="session"
    )
    seed = st.number_input(
        "Seed",
        0,
        LARGEST_SEED,
        key="draw_seed",
        persist_state="session",
        help="The same seed draws the same picture.",
    )
    st.toggle("A new seed each time", key="draw_random_seed", persist_state="session")
    width, height = sizes[size]
    return Drawing(
        model=model,
        prompt=state.get("draw_prompt", ""),
        negative_prompt=state.get("draw_negative_prompt", ""),
        scheduler=scheduler,
        num_inference_steps=int(steps),
        guidance_scale=float(guidance),
        seed=int(seed),
        width=width,
        height=height,
        count=int(count),
        compare=bool(state.get("draw_compare")) and bool(model.loras),
    )


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
    state = st.session_state
    if state.get("draw_random_seed"):
        state.draw_seed = random.randrange(LARGEST_SEED)
    # Widgets of this very click, such as a prompt that was just written, are in the state and not yet in the drawing.
    drawing = replace(
        drawing, seed=state.draw_seed, prompt=state.draw_prompt, negative_prompt=state.draw_negative_prompt or ""
    )
    state.draw_error = ""
    if not drawing.prompt.strip():
        state.draw_error = "Write a prompt first: what shall be on the picture?"
        return
    try:
        state.job = session.engine().submit(drawing)
    except UserError as error:
        state.draw_error = str(error)


def _result() -> None:
    job: Job | None = st.session_state.get("job")
    if st.session_state.get("draw_error"):
        session.tell_error(st.session_state.draw_error)
    if job is None:
        if not st.session_state.get("gallery"):
            _welcome()
    elif job.over:
        _collect(job)
        if job.state == "failed":
            session.tell_error(job.sentence)
        elif job.state == "cancelled":
            st.info("Cancelled.", icon=":material/block:")
    else:
        _live()


def _welcome() -> None:
    with st.container(border=True, horizontal_alignment="center", height=260, vertical_alignment="center"):
        st.markdown(":material/image:  Press **Draw**: your picture appears here.", width="content")
        st.caption("The first one takes longer, while the model is loaded and compiled.", width="content")


def _collect(job: Job) -> None:
    """Put what a job has drawn into the gallery, once."""
    if st.session_state.get("collected") == job.number:
        return
    st.session_state.collected = job.number
    st.session_state.gallery = gallery.added(st.session_state.get("gallery", []), gallery.entries_of(job))


@st.fragment(run_every=POLL_SECONDS)
def _live() -> None:
    job: Job = st.session_state.job
    job.watched = time.monotonic()
    if job.over:
        st.rerun()
    with st.container(border=True):
        text, button = st.columns([5, 1], vertical_alignment="center")
        text.progress(job.step.share if job.step else 0.0, text=_progress_text(job))
        button.button("Cancel", key="cancel_button", on_click=session.engine().cancel, args=(job,), width="stretch")
        shown_sides = job.drawing.sides
        columns = st.columns(max(len(shown_sides), 2), wrap=False)
        for column, side in zip(columns, shown_sides, strict=False):
            newest = next((p for p in reversed(job.pictures) if p.side == side), None)
            preview = job.preview if job.preview and job.preview.side == side else None
            pixels = preview.preview if preview else newest.pixels if newest else None
            if pixels is not None:
                column.image(pixels, width="stretch", caption=_side_label(side, job.drawing))


def _progress_text(job: Job) -> str:
    if job.cancel_asked:
        return "Ending after this step"
    if job.state == "waiting":
        ahead = session.engine().ahead(job)
        return f"Waiting: {ahead} drawing{'s' if ahead != 1 else ''} before this one"
    if job.phase or not job.step:
        return job.phase or "Starting"
    step, drawing = job.step, job.drawing
    words = [f"step {step.step} of {step.steps}"]
    if drawing.count > 1:
        words.insert(0, f"picture {step.number + 1} of {drawing.count}")
    if step.side == "base":
        words.insert(0, "without the LoRAs")
    if step.stage == "refiner":
        words.insert(0, "refiner")
    if job.seconds_left is not None:
        words.append(f"about {_duration(job.seconds_left)} left")
    line = ", ".join(words)
    return line[0].upper() + line[1:]


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _side_label(side: str, drawing: Drawing) -> str | None:
    if not drawing.compare:
        return None
    return "With the LoRA" if side == "adapted" else "Without it, same seed"


def _gallery() -> None:
    entries: list[Entry] = st.session_state.get("gallery", [])
    if not entries:
        return
    latest = [entry for entry in entries if entry.drawing is entries[0].drawing]
    _entries(list(reversed(latest)), large=True)
    earlier = entries[len(latest) :]
    if earlier:
        st.subheader("Earlier in this session", anchor=False)
        _entries(earlier, large=False)


def _entries(entries: list[Entry], large: bool) -> None:
    per_row = (1 if len(entries) == 1 else 2) if large else 4
    if large and not entries[0].drawing.compare:
        per_row = min(max(len(entries), 2), 3)
    for start in range(0, len(entries), per_row):
        columns = st.columns(per_row)
        for column, entry in zip(columns, entries[start : start + per_row], strict=False):
            with column.container(border=True):
                _entry(entry, large)


def _entry(entry: Entry, large: bool) -> None:
    sides = list(entry.files)
    for column, side in zip(st.columns(len(sides), gap="small", wrap=False), sides, strict=True):
        column.image(entry.files[side], width="stretch", caption=_side_label(side, entry.drawing))
    drawing = entry.drawing
    if large:
        scheduler, guidance = SCHEDULERS[drawing.scheduler], drawing.guidance_scale
        how = f"{drawing.num_inference_steps} steps of {scheduler}, guidance {guidance:g}"
        st.caption(f"{drawing.prompt}  \nseed {drawing.seed}, {how}")
    with st.container(horizontal=True, gap="small"):
        st.download_button(
            "PNG" if large else "",
            entry.files["adapted"],
            f"{entry.name}.png",
            "image/png",
            key=f"png {entry.name}",
            icon=":material/download:",
            help="The picture; its settings are inside",
            on_click="ignore",
        )
        st.download_button(
            "Settings" if large else "",
            entry.settings_file,
            f"{entry.name}.json",
            "application/json",
            key=f"json {entry.name}",
            icon=":material/tune:",
            help="The settings, as JSON",
            on_click="ignore",
        )
        st.button(
            "Use again" if large else "",
            key=f"again {entry.name}",
            on_click=_use_again,
            args=(entry,),
            icon=":material/replay:",
            help="Use these settings again",
        )


def _use_again(entry: Entry) -> None:
    drawing, state = entry.drawing, st.session_state
    state.draw_model, state.draw_loras = drawing.model.base, list(drawing.model.loras)
    for name, scale in zip(drawing.model.loras, drawing.lora_scales, strict=True):
        state[f"scale {name}"] = scale
    state.draw_prompt, state.draw_negative_prompt = drawing.prompt, drawing.negative_prompt
    state.draw_steps, state.draw_count = drawing.num_inference_steps, drawing.count
    state.draw_guidance, state.draw_guidance_of = drawing.guidance_scale, drawing.model.base
    state.draw_scheduler, state.draw_seed, state.draw_random_seed = drawing.scheduler, drawing.seed, False
    state.draw_compare = drawing.compare
    sizes = describe(Path(drawing.model.base)).sizes()
    state.draw_size = next((name for name, size in sizes.items() if size == (drawing.width, drawing.height)), "Square")

"""What comes of a request: the picture as it forms, and the gallery of the session."""

import time
from contextlib import suppress
from pathlib import Path

import streamlit as st

from demo import gallery, session
from demo.engine import Job
from demo.gallery import Entry
from demo.library import describe
from demo.messages import PictureRequest
from demo.sample_controls import SCHEDULERS
from dreambooth_ms.errors import UserError, count_of

POLL_SECONDS = 0.4
CARD_WIDTH = 172
"""Of the small pictures, in pixels: two beside each other on a phone."""


def show_result() -> None:
    """Where the request of this window is, or what came of it."""
    window = session.window()
    job = window.job
    if st.session_state.get("sample_error"):
        session.show_error(st.session_state.sample_error)
    if job is None:
        _welcome()
        return
    st.query_params["window"] = window.name
    if job.over:
        _collect(window, job)
        if job.state == "failed":
            session.show_error(job.sentence)
        elif job.state == "cancelled":
            st.info("Cancelled.", icon=":material/block:")
    else:
        _live(job)


def _welcome() -> None:
    with st.container(border=True, horizontal_alignment="center", height=260, vertical_alignment="center"):
        st.markdown(":material/image:  Press **Generate**: your picture appears here.", width="content")
        st.caption("The first one takes longer, while the model is loaded and compiled.", width="content")


def _collect(window: session.Window, job: Job) -> None:
    """Put what a job has sampled into the gallery, once."""
    if window.collected != job.number:
        window.collected = job.number
        window.gallery = gallery.added(window.gallery, gallery.entries_of(job))


@st.fragment(run_every=POLL_SECONDS)
def _live(job: Job) -> None:
    job.watched = time.monotonic()
    if job.over:
        st.rerun()
    with st.container(border=True):
        text, button = st.columns([5, 1], vertical_alignment="center")
        text.progress(job.step.share if job.step else 0.0, text=_progress_text(job))
        button.button("Cancel", key="cancel_button", on_click=session.engine().cancel, args=(job,), width="stretch")
        shown_sides = job.request.sides
        columns = st.columns(max(len(shown_sides), 2), wrap=False)
        for column, side in zip(columns, shown_sides, strict=False):
            newest = next((p for p in reversed(job.pictures) if p.side == side), None)
            preview = job.preview  # Once: the engine's thread changes it.
            forming = preview.preview if preview and preview.side == side else None
            pixels = forming if forming is not None else newest.pixels if newest else None
            if pixels is not None:
                column.image(gallery.address_of(pixels), width="stretch", caption=_side_label(side, job.request))


def _progress_text(job: Job) -> str:
    if job.cancel_asked:
        return "Ending after this step"
    if job.state == "waiting":
        ahead = session.engine().ahead(job)
        return f"Waiting: {count_of(ahead, 'request')} before this one"
    if job.phase or not job.step:
        return job.phase or "Starting"
    step, request = job.step, job.request
    words = [f"step {step.step} of {step.steps}"]
    if request.count > 1:
        words.insert(0, f"picture {step.number + 1} of {request.count}")
    if step.side == "base":
        words.insert(0, "without the LoRAs")
    if step.stage != "base":
        words.insert(0, step.stage)
    if job.seconds_left is not None:
        words.append(f"about {_duration(job.seconds_left)} left")
    line = ", ".join(words)
    return line[0].upper() + line[1:]


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _side_label(side: str, request: PictureRequest) -> str | None:
    if not request.compare:
        return None
    return "With the LoRA" if side == "adapted" else "Without it, same seed"


def show_gallery() -> None:
    """What was sampled in this window, the newest large."""
    entries = session.window().gallery
    if not entries:
        return
    latest = [entry for entry in entries if entry.request is entries[0].request]
    _latest(list(reversed(latest)))
    earlier = entries[len(latest) :]
    if earlier:
        st.subheader("Earlier in this session", anchor=False)
        with st.container(horizontal=True):
            for entry in earlier:
                with st.container(border=True, width=CARD_WIDTH):
                    st.image(entry.thumbnail(), width="stretch")
                    _buttons(entry, with_words=False)


def _latest(entries: list[Entry]) -> None:
    per_row = min(len(entries), 2) if entries[0].request.compare else min(max(len(entries), 2), 3)
    for start in range(0, len(entries), per_row):
        for column, entry in zip(st.columns(per_row), entries[start : start + per_row], strict=False):
            with column.container(border=True):
                _entry(entry)


def _entry(entry: Entry) -> None:
    sides, request = list(entry.files), entry.request
    for column, side in zip(st.columns(len(sides), gap="small", wrap=False), sides, strict=True):
        column.image(entry.files[side], width="stretch", caption=_side_label(side, request))
    scheduler, guidance = SCHEDULERS[request.scheduler], request.guidance_scale
    how = f"{count_of(request.num_inference_steps, 'step')} of {scheduler}, guidance {guidance:g}"
    st.caption(f"{request.prompt}  \nseed {request.seed}, {how}")
    _buttons(entry, with_words=True)


def _buttons(entry: Entry, with_words: bool) -> None:
    files = (
        ("PNG", next(iter(entry.files.values())), "png", "download", "The picture; its settings are inside"),
        ("Settings", entry.settings_file, "json", "tune", "The settings, as JSON"),
    )
    with st.container(horizontal=True, gap="small" if with_words else None):
        for word, content, suffix, icon, meaning in files:
            st.download_button(
                word if with_words else "",
                content,
                f"{entry.name}.{suffix}",
                key=f"{suffix} {entry.name}",
                icon=f":material/{icon}:",
                help=meaning,
                on_click="ignore",
            )
        st.button(
            "Use again" if with_words else "",
            key=f"again {entry.name}",
            on_click=use_again,
            args=(entry.request,),
            icon=":material/replay:",
            help="Use these settings again",
        )


def use_again(request: PictureRequest) -> None:
    """Set the widgets to what a request asked for."""
    state = st.session_state
    state.sample_model, state.sample_loras = request.model.base, list(request.model.loras)
    state.sample_embeddings = list(request.model.embeddings)
    for name, scale in zip(request.model.loras, request.lora_scales, strict=True):
        state[f"scale {name}"] = scale
    state.sample_prompt, state.sample_negative_prompt = request.prompt, request.negative_prompt
    state.sample_steps, state.sample_count = request.num_inference_steps, request.count
    state.sample_guidance, state.sample_guidance_of = request.guidance_scale, request.model.base
    state.sample_scheduler, state.sample_seed, state.sample_random_seed = request.scheduler, request.seed, False
    state.sample_compare = request.compare
    state.sample_refiner, state.sample_refiner_start = request.model.refiner, request.refiner_start
    with suppress(UserError, OSError):  # The page says it if the model is gone.
        sizes = describe(Path(request.model.base)).sizes().items()
        state.sample_size = next((name for name, size in sizes if size == (request.width, request.height)), "Square")

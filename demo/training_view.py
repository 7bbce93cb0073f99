"""A training as it goes: figures, curves and pictures, and what can be done with it."""

import itertools
import math
from pathlib import Path
from typing import Literal

import altair as alt
import pandas as pd
import streamlit as st

from demo import session, training_process
from demo.training_process import State, Training

POLL_SECONDS = 1.0
PNG_END = b"IEND\xaeB`\x82"
POINTS = 400
"""So many points of a curve are sent to the browser."""
SUBJECTS, CLASSES = ("#b4471f", "#8a5fa8", "#c2912a"), ("#3f7d78", "#5f86a8", "#7d9a4f")
"""The colours of their curves; after the last the first comes again."""
BADGES: dict[State, Literal["green", "blue", "gray", "red"]] = {
    "running": "green",
    "finished": "blue",
    "stopped": "gray",
    "failed": "red",
}
_SMOOTHED_SHARE = 10


def watch(training: Training) -> None:
    """Show a training, live while it runs."""
    st.session_state.watched_state = training.state
    if training.state == "running":
        _live(training)
    else:
        _content(training)


@st.fragment(run_every=POLL_SECONDS)
def _live(training: Training) -> None:
    if training.state != "running":
        st.rerun()
    _content(training)


def _content(training: Training) -> None:
    state = training.state
    with st.container(horizontal=True, vertical_alignment="center"):
        st.subheader(training.name, anchor=False, width="content")
        st.badge(state, color=BADGES[state])
        if state != "finished" and not training.is_of_a_page:
            again = "Started in a terminal: give its command there again"
            st.caption(f"In a terminal: {training.runner}" if state == "running" else again, width="content")
        st.space("stretch")
        _buttons(training)
    if state == "failed":
        for sentence in training.errors():
            session.show_error(sentence)
    history = training.history()
    _figures(training, history)
    left, right = st.columns([3, 2], gap="large")
    with left:
        if len(history) > 1:
            _curves(history)
        elif state == "running":
            st.caption("The curve of the loss appears with the first steps.")
    with right:
        _pictures(training)
    for strip in whole_pictures(training.strip()):
        st.image(strip)
    with st.expander("What it says"):
        st.code(training.log(4000) or "Nothing yet.", language=None)


def _buttons(training: Training) -> None:
    state = training.state
    if training.can_be_stopped:
        st.button(
            "Stop",
            icon=":material/stop:",
            key="stop_training",
            on_click=training.stop,
            help="It finishes its step and saves, and can be resumed.",
        )
    elif state in ("stopped", "failed") and training.can_be_resumed:
        st.button("Resume", icon=":material/play_arrow:", key="resume_training", on_click=_resume, args=(training,))
    # Not while it runs: that part of the page is shown again by itself, and a click on it may be lost.
    done = state != "running" and training.has_result
    if done and st.button("Generate with it", type="primary", icon=":material/brush:", key="sample_with_it"):
        st.session_state.sample_with_run = str(training.folder)
        st.switch_page(session.PAGES["sample"])


def _resume(training: Training) -> None:
    with session.sentences():
        session.engine().unload()
        training_process.resume(training)


def _figures(training: Training, history: list[dict[str, float]]) -> None:
    bar = training.bar()
    running = training.state == "running"
    if running and (not history or bar is None or bar.name != "training"):
        before = bar if bar and bar.name != "training" else None
        text = f"{before.name}: {before.done} of {before.total}, {before.time_left} left" if before else "starting"
        text = training.compiling or text
        st.progress(before.done / before.total if before and before.total else 0.0, text=text[0].upper() + text[1:])
        return
    total = bar.total if bar and bar.name == "training" else None
    if running and bar:
        left = "" if "?" in bar.time_left else f"{bar.time_left} left"
        st.progress(min(bar.done / bar.total, 1.0) if bar.total else 0.0, text=left)
    if not history:
        return
    recent = history[-min(len(history), 20) :]
    last = history[-1]
    figures = {
        "Step": f"{last['step']:.0f}" + (f" / {total}" if total else ""),
        "Loss, mean of 20": f"{sum(report['loss'] for report in recent) / len(recent):.4f}",
        "Learning rate": f"{last['learning_rate']:.2e}",
        "Speed": bar.rate if bar and bar.name == "training" else "–",
    }
    with st.container(horizontal=True, gap="large"):
        for label, value in figures.items():
            st.metric(label, value, width="content")


def _curves(history: list[dict[str, float]]) -> None:
    table = curve_table(history)
    shown = list(dict.fromkeys(table["of"]))
    subjects, classes = itertools.cycle(SUBJECTS), itertools.cycle(CLASSES)
    scale = alt.Scale(domain=shown, range=[next(classes if of.startswith("class") else subjects) for of in shown])
    base = alt.Chart(table).encode(
        x=alt.X("step:Q", title="step", axis=alt.Axis(tickMinStep=1)),
        color=alt.Color("of:N", scale=scale, title=None, legend=alt.Legend(orient="top")),
    )
    faint = base.mark_line(opacity=0.3, strokeWidth=1).encode(y=alt.Y("loss:Q", title="loss"))
    strong = base.mark_line(strokeWidth=2.5).encode(y="mean:Q")
    st.altair_chart((faint + strong).properties(height=300), width="stretch")


def curve_table(history: list[dict[str, float]]) -> pd.DataFrame:
    """Columns step, of (subject, class, subject 2 …), loss, and mean: a running one over a tenth of the steps."""
    every = max(math.ceil(len(history) / POINTS), 1)
    parts = []
    # A step may have rows of some concepts only.
    for column in dict.fromkeys(name for report in history for name in report if name.endswith("_loss")):
        of = column.removesuffix("_loss").replace("instance", "subject").replace("_", " ")
        own = [report for report in history if column in report]
        window = max(len(own) // _SMOOTHED_SHARE, 1)
        part = pd.DataFrame({"step": [r["step"] for r in own], "of": of, "loss": [r[column] for r in own]})
        part["mean"] = part["loss"].rolling(window, min_periods=1, center=True).mean()
        parts.append(part.iloc[::every])
    return pd.concat(parts) if parts else pd.DataFrame({"step": [], "of": [], "loss": [], "mean": []})


def _pictures(training: Training) -> None:
    found = {step: whole_pictures(paths) for step, paths in training.validation_pictures().items()}
    for step, pictures in reversed(found.items()):
        if pictures:
            st.caption(f"After step {step}")
        for start in range(0, len(pictures), 2):
            for column, picture in zip(st.columns(2, wrap=False), pictures[start : start + 2], strict=False):
                column.image(picture, width="stretch")
    if not any(found.values()) and training.state == "running":
        st.caption("Pictures that are generated during the training appear here.")


def whole_pictures(paths: list[Path]) -> list[bytes]:
    """The PNG files that have their end: of the others, one is being written, and another was cut."""
    return [file for path in paths if (file := path.read_bytes()).endswith(PNG_END)]

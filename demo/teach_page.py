"""The page to teach on: photographs, words, a training to start and to watch."""

import itertools
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from demo import session, training_process
from demo.library import ModelFacts, Places, find
from demo.model_control import EMBEDDED, advise, model_control
from demo.photographs import look_at
from demo.subject_controls import ask_words, choose_pictures, show_look
from demo.subjects import Pictures, Subject, write
from demo.training_plan import (
    BY_WORDS,
    METHODS,
    Preset,
    TrainingWishes,
    flags,
    name_of,
    preset_files,
    rate_of,
    read_preset,
)
from demo.training_process import Training
from demo.training_view import watch
from dreambooth_ms.config.choices import Method
from dreambooth_ms.config.train import split_words
from dreambooth_ms.data.plan import Plan, table_of_sizes
from dreambooth_ms.errors import UserError
from dreambooth_ms.models.specs import Family

NEW = "New training"
SHOWN_TRAININGS = 8
CHECK = "What the training will make of the photographs and the prompt, what it needs, and how long it will take."
MOST_SUBJECTS = 6
STATE_ICONS = {"running": "progress_activity", "finished": "check", "stopped": "pause", "failed": "warning"}

Answer = TypeVar("Answer")


def show() -> None:
    """Show the page."""
    st.html(session.STYLE)
    places = session.places()
    trainings = training_process.trainings(places.runs)[:SHOWN_TRAININGS]
    by_name = {training.name: training for training in trainings}
    state = st.session_state
    if "teach_next" in state:
        state.teach_chosen = state.pop("teach_next")
    if "teach_chosen" not in state:
        running = next((training.name for training in trainings if training.state == "running"), NEW)
        state.teach_chosen = running
    if state.teach_chosen not in (NEW, *by_name):
        state.teach_chosen = NEW
    chosen = st.segmented_control(
        "Trainings",
        [NEW, *by_name],
        key="teach_chosen",
        persist_state="session",
        required=True,
        wrap=True,
        format_func=lambda name: name if name == NEW else f":material/{STATE_ICONS[by_name[name].state]}: {name}",
        label_visibility="collapsed",
    )
    if chosen in by_name:
        watch(by_name[chosen])
    else:
        _new_training(places)


def _new_training(places: Places) -> None:
    shelf = find(places)
    models = [path for path in shelf.models if not path.is_relative_to(places.runs)]
    if not models:
        session.show_error(f"There is no model in {places.listed()}; start the page with `-- --folder DIR`.")
        return
    advice = st.container()
    left, right = st.columns([3, 2], gap="large")
    with left:  # Whatever the base is: an upload whose widget is not shown is forgotten.
        st.subheader("Photographs of the subject", anchor=False)
        blocks = _blocks()
        below = st.container()
        chosen = [_in(block, choose_pictures, places, number) for number, block in enumerate(blocks)]
    with right:
        st.subheader("The training", anchor=False)
        facts = _base(places, models)
        preset = _preset(facts) if facts else None
    if facts and facts.path == EMBEDDED:
        with advice:
            advise("teach_model")
    if facts is None or preset is None:
        return
    small = facts.is_small
    with right:
        method = _method()
        new_words, initial_words = _new_words(len(blocks), small) if method in BY_WORDS else ([], [])
        prior = _prior(preset, method)
    by_words = method in BY_WORDS
    words = [_in(block, ask_words, number, small, prior, by_words) for number, block in enumerate(blocks)]
    with right:
        wishes = _wishes(facts, preset, [prompt for prompt, _ in words], method)
        wishes = replace(wishes, new_words=new_words, initial_words=initial_words)
    subjects = _subjects(blocks, chosen, words, wishes, below)
    with right:
        _start(places, wishes, words, subjects)


def _in(block: DeltaGenerator, ask: Callable[..., Answer], *arguments: Any) -> Answer:
    with block:
        return ask(*arguments)


def _blocks() -> list[DeltaGenerator]:
    """A place for each subject."""
    state = st.session_state
    count = state.setdefault("teach_subjects", 1)
    blocks = st.tabs([f"Subject {number + 1}" for number in range(count)]) if count > 1 else [st.container()]
    with st.container(horizontal=True):
        if count < MOST_SUBJECTS:
            st.button("Add a subject", icon=":material/add:", key="add_subject", on_click=_change_count, args=(1,))
        if count > 1:
            st.button(
                "Remove the last", icon=":material/remove:", key="remove_subject", on_click=_change_count, args=(-1,)
            )
    return list(blocks)


def _change_count(by: int) -> None:
    st.session_state.teach_subjects += by


def _base(places: Places, models: list[Path]) -> ModelFacts | None:
    st.session_state.setdefault("teach_model", str(models[0]))
    facts = model_control("Base model", "teach_model", places, models)
    if facts and facts.family is Family.SDXL_REFINER:
        session.show_error(f"{session.label(str(facts.path))}: SDXL's refiner; choose a base model")
        return None
    if facts and facts.enlarges:
        session.show_error(f"{session.label(str(facts.path))}: a second stage; `dreambooth-ms train` teaches it")
        return None
    return facts


def _preset(facts: ModelFacts) -> Preset | None:
    files = preset_files(facts)
    file = files[0]
    if len(files) > 1:
        file = st.selectbox(
            "Settings of", files, format_func=lambda path: path.stem, key=f"teach_preset {facts.family}"
        )
    try:
        return read_preset(file)
    except UserError as error:
        session.show_error(error)
        return None


def _method() -> Method:
    method: Method = st.segmented_control(
        "What is trained",
        list(METHODS),
        default="lora",
        required=True,
        wrap=True,
        format_func=METHODS.__getitem__,
        key="teach_method",
        persist_state="session",
        help="LoRA: a small addition to the model. All weights: the model itself, which takes the most memory. Custom "
        "Diffusion: how the model reads text, and a new word. New words alone: the smallest, the model stays as it is.",
    )
    return method


def _new_words(count: int, small: bool) -> tuple[list[str], list[str]]:
    """The new words, one for each subject, and those of the vocabulary that they start from, if any are named."""
    left, right = st.columns(2)
    joined = left.text_input(
        "New words",
        "+".join(f"<new{number + 1}>" for number in range(count)),
        key=f"teach_words {count}",
        persist_state="session",
        help="One for each subject, put together by +. The prompts name the subjects by them.",
    )
    start = right.text_input(
        "Start from",
        "+".join(["star" if small else "dog"] * count),
        key=f"teach_initial {count} {small}",
        persist_state="session",
        help="A word for each that is one token, usually its class, put together by +; empty for rare words.",
    )
    return split_words(joined), split_words(start)


def _prior(preset: Preset, method: Method) -> bool:
    return st.toggle(
        "Keep the class as it is",
        preset.with_prior_preservation and method != "textual_inversion",
        key=f"teach_prior {preset.file.stem}{' alone' * (method == 'textual_inversion')}",
        persist_state="session",
        help="Prior preservation: pictures of the class are generated first and trained beside.",
    )


def _wishes(facts: ModelFacts, preset: Preset, prompts: Sequence[str], method: Method) -> TrainingWishes:
    key, usual_rate = preset.file.stem, rate_of(preset, method)
    left, right = st.columns(2)
    steps = left.number_input(
        "Steps", 1, 100_000, preset.max_train_steps, key=f"teach_steps {key}", persist_state="session"
    )
    rate = right.number_input(
        "Learning rate",
        1e-7,
        1.0,
        usual_rate,
        format="%.1e",
        step=usual_rate / 10,
        key=f"teach_rate {key}{'' if method == 'lora' else ' ' + method}",
        persist_state="session",
    )
    validation = _follows(
        "Generate during training",
        f"teach_validation {facts.is_small}",
        "\n".join(prompts),
        "Prompts to watch the subjects being learnt by, one in each line; empty to generate nothing.",
        is_long=True,
    )
    buckets = st.toggle(
        "Sizes of several shapes",
        key="teach_buckets",
        persist_state="session",
        help="Each photograph is trained at the size that cuts off least of it; each size is compiled once.",
    )
    return TrainingWishes(
        base=facts.path,
        preset=preset,
        resolution=facts.picture_size,
        buckets=buckets,
        side_step=facts.side_step,
        max_train_steps=int(steps),
        method=method,
        learning_rate=float(rate),
        validation_prompts=[line.strip() for line in validation.splitlines() if line.strip()],
        **_more(preset, int(steps), method),
    )


def _more(preset: Preset, steps: int, method: Method) -> dict[str, Any]:
    """What few people set."""
    key = preset.file.stem
    with st.expander("More"):
        left, right = st.columns(2)
        every = left.number_input(
            "Generate every … steps", 1, 100_000, max(steps // 4, 1), key=f"teach_every {key} {steps}"
        )
        pictures = right.number_input("Pictures each time", 1, 8, 2, key="teach_pictures", persist_state="session")
        rank = preset.rank
        if method == "lora":
            rank = left.number_input("Rank", 1, 512, preset.rank, key=f"teach_rank {key}", persist_state="session")
        classes = right.number_input(
            "Class pictures", 1, 5000, preset.num_class_images, key=f"teach_classes {key}", persist_state="session"
        )
        center = st.toggle(
            "Crop the centre",
            preset.center_crop,
            key=f"teach_crop {key}",
            persist_state="session",
            help="Otherwise another random part is cropped each time.",
        )
        # New words are trained in the text encoders, of which all else stays as it is.
        text = method not in BY_WORDS and st.toggle(
            "Train the text encoder too", preset.train_text_encoder, key=f"teach_text {key}", persist_state="session"
        )
        seed = st.number_input("Seed", 0, 2**31 - 1, 0, key="teach_seed", persist_state="session")
    return {
        "num_class_images": int(classes),
        "rank": int(rank),
        "center_crop": center,
        "train_text_encoder": text,
        "validation_steps": int(every),
        "num_validation_images": int(pictures),
        "seed": int(seed),
    }


def _subjects(
    blocks: Sequence[DeltaGenerator],
    chosen: Sequence[Pictures | None],
    words: Sequence[tuple[str, str | None]],
    wishes: TrainingWishes,
    below: DeltaGenerator,
) -> list[Subject] | None:
    """Show what the training will see of the photographs; gives the subjects, None while it could not start."""
    there = [(block, own, said) for block, own, said in zip(blocks, chosen, words, strict=True) if own]
    if not there:
        return None
    try:
        looks, plan = look_at([own for _, own, _ in there], wishes.framing, wishes.seed)
    except UserError as error:
        session.show_error(error)
        return None
    how = "The bright part is what is trained on."
    if not wishes.center_crop:
        how = "The bright part is what the first pass is trained on; the next passes see other parts."
    subjects = []
    for number, ((block, own, (prompt, class_prompt)), look) in enumerate(zip(there, looks, strict=True)):
        captions = _in(block, show_look, number, look, own, prompt, how)
        uploaded = own.folder.is_relative_to(session.upload_folder())
        subjects.append(
            Subject(pictures=own, prompt=prompt, class_prompt=class_prompt, captions=captions, is_uploaded=uploaded)
        )
    if plan and wishes.buckets:
        _in(below, _show_sizes, plan, wishes.max_train_steps)
    ready = len(there) == len(blocks) and all(look.usable for look in looks)
    return subjects if ready else None


def _show_sizes(plan: Plan, steps: int) -> None:
    rows = [
        {"Size": f"{width} × {height}", "Photographs": pictures, "Cut off": f"{lost:.0%}", "Steps": own}
        for (width, height), pictures, lost, own in table_of_sizes(plan, steps)
    ]
    st.table(pd.DataFrame(rows).set_index("Size"))


def _start(
    places: Places, wishes: TrainingWishes, words: Sequence[tuple[str, str | None]], subjects: list[Subject] | None
) -> None:
    stem = name_of(words)
    names = (stem if number == 1 else f"{stem}-{number}" for number in itertools.count(1))
    name = _follows("Name", "teach_name", next(name for name in names if not (places.runs / name).exists()))
    running = training_process.running(places.runs)
    if running:
        st.caption(f"{running.name} is being trained; wait for its end, or stop it.")
    if subjects and st.button("Check", icon=":material/fact_check:", key="teach_check", help=CHECK):
        with st.spinner("Looking at it …"), tempfile.TemporaryDirectory() as folder:
            write(subjects, Path(folder))
            arguments = training_process.arguments_of(flags(wishes, subjects, Path(folder)), wishes.preset.file)
            st.code("\n".join(training_process.check(arguments)), language=None, wrap_lines=True)
    ready = subjects is not None and running is None
    if not st.button("Teach", type="primary", icon=":material/school:", disabled=not ready, key="teach_button"):
        return
    with session.sentences():
        assert subjects is not None
        target = training_process.new_folder(places.runs, name.strip())
        try:
            write(subjects, target)
            arguments = training_process.arguments_of(flags(wishes, subjects, target), wishes.preset.file)
            training = training_process.start(target, arguments)
        except UserError:
            shutil.rmtree(target, ignore_errors=True)
            raise
        session.engine().unload()
        _show_next(training)


def _show_next(training: Training) -> None:
    """Show this training when the page is shown again: a widget's value cannot be set after it was shown."""
    st.session_state.teach_next = training.name
    st.rerun()


def _follows(label: str, key: str, suggestion: str, meaning: str | None = None, is_long: bool = False) -> str:
    """A text that follows the prompt until another one is written."""
    state, before = st.session_state, f"{key} suggested"
    if key not in state or state[key] == state.get(before):
        state[key] = suggestion
    state[before] = suggestion
    if is_long:
        return st.text_area(label, key=key, height="content", persist_state="session", help=meaning)
    return st.text_input(label, key=key, persist_state="session", help=meaning)

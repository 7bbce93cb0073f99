"""The page to teach on: photographs, words, a training to start and to watch."""

import itertools
import shutil
from pathlib import Path

import streamlit as st

from demo import session, training_process, uploads
from demo.library import ModelFacts, Places, find, find_photographs
from demo.model_control import EMBEDDED, advise, model_control
from demo.photographs import Look, Photograph, look_at
from demo.training_plan import Preset, TrainingWishes, flags, name_of, preset_files, read_preset
from demo.training_process import Training
from demo.training_view import watch
from dreambooth_ms.errors import UserError, count_of
from dreambooth_ms.models.specs import Family

NEW = "New training"
FOLDER, UPLOAD = "From a folder", "Upload"
SHOWN_TRAININGS = 8
CARD_WIDTH = 165
"""Of a photograph, in pixels: two beside each other on a phone."""
CHECK = "What the training will make of the photographs and the prompt, what it needs, and how long it will take."
STATE_ICONS = {"running": "progress_activity", "finished": "check", "stopped": "pause", "failed": "warning"}


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
        folder = _photographs(places)
    with right:
        st.subheader("The training", anchor=False)
        facts = _base(places, models)
        preset = _preset(facts) if facts else None
    if facts and facts.path == EMBEDDED:
        with advice:
            advise("teach_model")
    if facts is None or preset is None:
        return
    with right:
        wishes = _wishes(facts, preset)
    with left:
        look = _look(folder, facts, wishes) if folder else None
    with right:
        _start(places, wishes, folder, look)


def _base(places: Places, models: list[Path]) -> ModelFacts | None:
    st.session_state.setdefault("teach_model", str(models[0]))
    facts = model_control("Base model", "teach_model", places, models)
    if facts and facts.family is Family.SDXL_REFINER:
        session.show_error(f"{session.label(str(facts.path))}: SDXL's refiner; choose a base model")
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


def _wishes(facts: ModelFacts, preset: Preset) -> TrainingWishes:
    small = facts.picture_size <= 64
    subject, kind = (
        ("a photo of a sks star", "a photo of a star") if small else ("a photo of sks dog", "a photo of dog")
    )
    prompt = st.text_input(
        "What the photographs show",
        subject,
        key=f"teach_prompt {small}",
        persist_state="session",
        help="A prompt with a rare word of your choice for the subject, before its class: sks is the custom.",
    )
    prior = st.toggle(
        "Keep the class as it is",
        preset.with_prior_preservation,
        key=f"teach_prior {preset.file.stem}",
        persist_state="session",
        help="Prior preservation: pictures of the class are generated first and trained beside.",
    )
    class_prompt = None
    if prior:
        class_prompt = st.text_input(
            "What its class looks like", kind, key=f"teach_class {small}", persist_state="session"
        )
    key = preset.file.stem
    left, right = st.columns(2)
    steps = left.number_input(
        "Steps", 1, 100_000, preset.max_train_steps, key=f"teach_steps {key}", persist_state="session"
    )
    rate = right.number_input(
        "Learning rate",
        1e-7,
        1.0,
        preset.learning_rate,
        format="%.1e",
        step=preset.learning_rate / 10,
        key=f"teach_rate {key}",
        persist_state="session",
    )
    validation = _follows(
        "Generate during training",
        f"teach_validation {small}",
        prompt,
        "A prompt to watch the subject being learnt by; empty to generate nothing.",
    )
    with st.expander("More"):
        left, right = st.columns(2)
        every = left.number_input(
            "Generate every … steps", 1, 100_000, max(int(steps) // 4, 1), key=f"teach_every {key} {steps}"
        )
        pictures = right.number_input("Pictures each time", 1, 8, 2, key="teach_pictures", persist_state="session")
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
        text = st.toggle(
            "Train the text encoder too", preset.train_text_encoder, key=f"teach_text {key}", persist_state="session"
        )
        seed = st.number_input("Seed", 0, 2**31 - 1, 0, key="teach_seed", persist_state="session")
    return TrainingWishes(
        base=facts.path,
        preset=preset,
        resolution=facts.picture_size,
        instance_prompt=prompt,
        class_prompt=class_prompt,
        num_class_images=int(classes),
        max_train_steps=int(steps),
        learning_rate=float(rate),
        rank=int(rank),
        center_crop=center,
        train_text_encoder=text,
        validation_prompt=validation or None,
        validation_steps=int(every),
        num_validation_images=int(pictures),
        seed=int(seed),
    )


def _photographs(places: Places) -> Path | None:
    """The folder with the photographs; None while there is none."""
    source = st.segmented_control(
        "Photographs",
        [FOLDER, UPLOAD],
        key="teach_source",
        default=FOLDER,
        required=True,
        persist_state="session",
        label_visibility="collapsed",
    )
    if source == UPLOAD:
        return _uploaded()
    names = [str(path) for path in find_photographs(places)]
    name = st.selectbox(
        "Folder",
        names,
        format_func=session.label,
        key="teach_folder",
        index=0 if names else None,
        accept_new_options=True,
        placeholder="The path of a folder",
        help=f"Found in {places.listed()}; or write the path of a folder there.",
    )
    if not name:
        return None
    with session.sentences():
        return places.confined(name)
    return None


def _uploaded() -> Path | None:
    files = st.file_uploader(
        "Photographs",
        type=uploads.PICTURE_TYPES,
        accept_multiple_files=True,
        key="teach_upload",
        max_upload_size=uploads.MAX_PICTURE_BYTES // uploads.MEGABYTE,
        label_visibility="collapsed",
    )
    folder = session.upload_folder() / "photographs"
    kept = set()
    for file in files or []:
        with session.sentences():
            kept.add(uploads.store_picture(folder, file.name, file.getvalue()))
    if folder.exists():
        for path in set(folder.iterdir()) - kept:
            path.unlink()
    return folder if kept else None


def _look(folder: Path, facts: ModelFacts, wishes: TrainingWishes) -> Look | None:
    try:
        look = look_at(folder, facts.picture_size, wishes.center_crop, wishes.seed)
    except UserError as error:
        session.show_error(error)
        return None
    for remark in look.remarks:
        st.info(remark, icon=":material/info:")
    how = (
        "The bright part is what is trained on."
        if wishes.center_crop
        else ("The bright part is what the first pass is trained on; the next passes see other parts.")
    )
    st.caption(f"{count_of(len(look.photographs), 'photograph')}. {how}")
    with st.container(horizontal=True):
        for photograph in look.photographs:
            with st.container(width=CARD_WIDTH):
                _photograph(photograph)
    return look


def _photograph(photograph: Photograph) -> None:
    if photograph.thumbnail:
        st.image(photograph.thumbnail, width="stretch")
        st.caption(f"{photograph.path.name}, {photograph.size[0]} × {photograph.size[1]}")
    else:
        st.caption(photograph.path.name)
    for problem in photograph.problems:
        st.caption(f":{'orange' if photograph.usable else 'red'}[:material/warning: {problem}]")


def _start(places: Places, wishes: TrainingWishes, folder: Path | None, look: Look | None) -> None:
    stem = name_of(wishes.instance_prompt, wishes.class_prompt)
    names = (stem if number == 1 else f"{stem}-{number}" for number in itertools.count(1))
    name = _follows("Name", "teach_name", next(name for name in names if not (places.runs / name).exists()))
    running = training_process.running(places.runs)
    if running:
        st.caption(f"{running.name} is being trained; wait for its end, or stop it.")
    if folder and st.button("Check", icon=":material/fact_check:", key="teach_check", help=CHECK):
        arguments = training_process.arguments_of(flags(wishes, folder, places.runs / name), wishes.preset.file)
        with st.spinner("Looking at it …"):
            st.code("\n".join(training_process.check(arguments)), language=None, wrap_lines=True)
    ready = look is not None and look.usable and running is None
    if not st.button("Teach", type="primary", icon=":material/school:", disabled=not ready, key="teach_button"):
        return
    with session.sentences():
        assert folder is not None
        target = training_process.new_folder(places.runs, name.strip())
        pictures = folder
        if folder.is_relative_to(session.upload_folder()):
            pictures = target / "photographs"
            shutil.copytree(folder, pictures)
        arguments = training_process.arguments_of(flags(wishes, pictures, target), wishes.preset.file)
        try:
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


def _follows(label: str, key: str, suggestion: str, meaning: str | None = None) -> str:
    """A text that follows the prompt until another one is written."""
    state, before = st.session_state, f"{key} suggested"
    if key not in state or state[key] == state.get(before):
        state[key] = suggestion
    state[before] = suggestion
    return st.text_input(label, key=key, persist_state="session", help=meaning)

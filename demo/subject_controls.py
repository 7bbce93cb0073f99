"""The widgets for one subject: its photographs and their masks, its words, and a caption for each photograph."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import streamlit as st

from demo import session, uploads
from demo.library import Places, find_photographs
from demo.photographs import Look, Photograph
from demo.subjects import Pictures
from dreambooth_ms.data.pictures import looks_like_a_picture
from dreambooth_ms.errors import DataError, count_of

FOLDER, UPLOAD = "From a folder", "Upload"
WHOLE, MASKS, OPAQUE = "The whole picture", "Masks", "What is not transparent"
CARD_WIDTH = 165
"""Of a photograph, in pixels: two beside each other on a phone."""


def key_of(name: str, number: int) -> str:
    """The key of a widget of a subject, counted from 0."""
    return f"teach_{name}" if number == 0 else f"teach_{name} {number + 1}"


def choose_pictures(places: Places, number: int) -> Pictures | None:
    """The subject's photographs, and what of them counts; None while there are none."""
    source = _choice("Photographs", key_of("source", number), [FOLDER, UPLOAD])
    stems = _uploaded(number) if source == UPLOAD else _in_folder(places, number)
    if not stems:
        return None
    folder = next(iter(stems.values())).parent
    counts = _choice("What is learnt of them", key_of("counts", number), [WHOLE, MASKS, OPAQUE], is_labelled=True)
    if counts == MASKS:
        return Pictures(folder, True, _masks(stems, number))
    return Pictures(folder, counts == OPAQUE)


def ask_words(number: int, small: bool, prior: bool, by_words: bool) -> tuple[str, str | None]:
    """The prompt of the photographs, and with prior preservation that of their class. `by_words`: whether it names the
    subject by a new word, which is learnt."""
    subject, kind = (
        ("a photo of a sks star", "a photo of a star") if small else ("a photo of sks dog", "a photo of dog")
    )
    rare = f"<new{number + 1}>" if by_words else ("sks", "zwx", "qxt", "ohwx", "vbl", "kju")[number % 6]
    subject = subject.replace("sks", rare)
    meaning = "A prompt with a rare word of your choice for the subject, before its class: sks is the custom."
    if by_words:
        meaning = "A prompt with the subject's new word, before its class."
    prompt = st.text_input(
        "What the photographs show",
        subject,
        key=key_of(f"prompt {small}{' by words' * by_words}", number),
        persist_state="session",
        help=meaning,
    )
    class_prompt = None
    if prior:
        class_prompt = st.text_input(
            "What its class looks like", kind, key=key_of(f"class {small}", number), persist_state="session"
        )
    return prompt, class_prompt


def show_look(number: int, look: Look, pictures: Pictures, prompt: str, how: str) -> dict[str, str]:
    """Show the photographs with what is wrong with them; returns the captions that are written for them, by name."""
    # An upload's folder has other photographs each time.
    folder = UPLOAD if pictures.folder.is_relative_to(session.upload_folder()) else pictures.folder
    how += " What is red does not count." if pictures.masked else ""
    for remark in look.remarks:
        st.info(remark, icon=":material/info:")
    st.caption(f"{count_of(len(look.photographs), 'photograph')}. {how}")
    captioned = st.toggle(
        "A caption for each",
        any(photograph.caption for photograph in look.photographs),
        key=key_of(f"captioned {folder}", number),
        persist_state="session",
        help="What each photograph shows, with the rare word; it is trained with this in place of the prompt.",
    )
    captions = {}
    with st.container(horizontal=True):
        for photograph in look.photographs:
            with st.container(width=CARD_WIDTH):
                _show(photograph)
                if captioned and photograph.usable:
                    name = photograph.path.name
                    captions[name] = st.text_area(
                        f"Caption of {name}",
                        photograph.caption or prompt,
                        key=key_of(f"caption {photograph.path}", number),
                        height=96,
                        persist_state="session",
                        label_visibility="collapsed",
                    )
    return captions


def _show(photograph: Photograph) -> None:
    if photograph.thumbnail:
        st.image(photograph.thumbnail, width="stretch")
        st.caption(f"{photograph.path.name}, {photograph.size[0]} × {photograph.size[1]}")
    else:
        st.caption(photograph.path.name)
    for problem in photograph.problems:
        st.caption(f":{'orange' if photograph.usable else 'red'}[:material/warning: {problem}]")


def _choice(label: str, key: str, options: list[str], is_labelled: bool = False) -> str | None:
    return st.segmented_control(
        label,
        options,
        key=key,
        default=options[0],
        required=True,
        persist_state="session",
        label_visibility="visible" if is_labelled else "collapsed",
    )


def _in_folder(places: Places, number: int) -> dict[str, Path]:
    """The photographs of the folder that is chosen, by their names without suffixes."""
    names = [str(path) for path in find_photographs(places)]
    name = st.selectbox(
        "Folder",
        names,
        format_func=session.label,
        key=key_of("folder", number),
        index=min(number, len(names) - 1) if names else None,
        accept_new_options=True,
        placeholder="The path of a folder",
        help=f"Found in {places.listed()}; or write the path of a folder there.",
    )
    found: dict[str, Path] = {}
    with session.sentences():
        folder = places.confined(name) if name else None
        if folder and folder.is_dir():
            found = {path.stem: path for path in sorted(folder.iterdir()) if looks_like_a_picture(path)}
        if folder and not found:
            raise DataError(f"{name}: no photographs in it")
    return found


def _uploaded(number: int) -> dict[str, Path]:
    """The photographs that were uploaded, by the names that they had."""
    stored = {}
    for file in _upload("Photographs", key_of("upload", number)):
        with session.sentences():
            stored[Path(file.name).stem] = uploads.store_picture(
                _own("photographs", number), file.name, file.getvalue()
            )
    _keep_only(_own("photographs", number), stored)
    return stored


def _masks(stems: Mapping[str, Path], number: int) -> Path:
    """The folder with the masks that were uploaded, each under the name of its photograph."""
    folder, stored = _own("masks", number), {}
    st.caption("White where a photograph shows the subject, black elsewhere; each mask is named as its photograph.")
    for file in _upload("Masks", key_of("masks", number)):
        with session.sentences():
            stem = Path(file.name).stem
            if stem not in stems:
                raise DataError(f"{file.name}: no photograph has this name; name each mask as its photograph")
            path = uploads.store_picture(folder, file.name, file.getvalue())
            stored[stem] = path.replace(folder / f"{stems[stem].stem}{path.suffix}")
    _keep_only(folder, stored)
    return folder


def _upload(label: str, key: str) -> list[Any]:
    return st.file_uploader(
        label,
        type=uploads.PICTURE_TYPES,
        accept_multiple_files=True,
        key=key,
        max_upload_size=uploads.MAX_PICTURE_BYTES // uploads.MEGABYTE,
        label_visibility="collapsed",
    )


def _own(name: str, number: int) -> Path:
    return session.upload_folder() / f"{name}-{number + 1}"


def _keep_only(folder: Path, stored: Mapping[str, Path]) -> None:
    for path in set(folder.iterdir() if folder.exists() else ()) - set(stored.values()):
        path.unlink()

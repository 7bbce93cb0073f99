"""What a run is to learn: its concepts, by the flags or by a list of several."""

import os
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np

from dreambooth_ms.cli.output import tell
from dreambooth_ms.cli.training_job import TrainingJob
from dreambooth_ms.config.concepts import ConceptConfig, concept_configs
from dreambooth_ms.config.train import CAPTIONS, OF_CUSTOM_DIFFUSION, TrainConfig, split_words
from dreambooth_ms.data.captions import Captioning, Wording
from dreambooth_ms.data.conditioning import PromptTokenizer
from dreambooth_ms.data.pictures import told
from dreambooth_ms.data.records import CLASS, INSTANCE, Concept, Source
from dreambooth_ms.errors import ConfigError, Tell, count_of
from dreambooth_ms.formats.files.open import read_value
from dreambooth_ms.models.specs import TABLE, Words
from dreambooth_ms.randomness import standard_normal
from dreambooth_ms.sampling.picture_file import missing_numbers
from dreambooth_ms.weights.bundle import ModelBundle


def sources_of(config: TrainConfig, tell: Tell = tell) -> tuple[Source, ...]:
    """Where concepts come from: the subjects, then the classes; such as are generated in the order of their subjects.
    Raises ConfigError if a list of several is wrong, or classes would mix with subjects or with each other."""
    configs = concept_configs(config, tell)
    subjects = [_source(one, INSTANCE) for one in configs if not one.concept.is_reg]
    classes = [_source(one, CLASS) for one in configs if one.concept.is_reg or one.prior.preserves_class]
    found, held = [], dict[str, tuple[object, ...]]()
    for number, source in chain(enumerate(subjects, 1), enumerate(classes, 1)):
        concept = source.concept
        of_several = f"_{number}" if number > 1 else ""
        drawn_as = concept.drawn_as and concept.drawn_as + of_several
        found.append(replace(source, concept=replace(concept, name=concept.group + of_several, drawn_as=drawn_as)))
        what = INSTANCE if drawn_as else concept.group, source.generated and (source.prompt, source.generated)
        if held.setdefault(os.path.realpath(source.folder), what) != what:
            raise ConfigError(f"{source.folder}: holds pictures of a class and others; give each a folder of its own")
    return tuple(found)


def _source(config: ConceptConfig, group: str) -> Source:
    """Of a subject, or of the class that goes with it or stands by itself."""
    data, prior, share, captions = config.data, config.prior, config.concept, config.captions
    of_class = group == CLASS and not share.is_reg
    combines = captions.read_prompt_from_txt in (CLASS, "both") if of_class else captions.combines
    replaces = not of_class and (captions.use_txt_as_label or (captions.caption_column and not combines))
    folder = (prior.folder if of_class else None) or Path(data.instance_data_dir or "")
    of_subject = of_class and not prior.folder
    is_real = of_class and not of_subject and prior.real_prior
    listed = is_real and (folder / "images").is_dir()
    weight, plain = prior.prior_loss_weight if group == CLASS else share.weight, Wording()
    wording = plain if of_class else Wording(captions.caption_dropout, captions.shuffle_caption, captions.keep_tokens)
    repeats = Fraction("1" if of_class else str(data.repeats))
    return Source(
        folder / "images" if listed else folder,
        (prior.class_prompt if of_class else data.instance_prompt) or "",
        Concept(group, (), weight, group, repeats, None if wording == plain else wording, INSTANCE * of_subject),
        Captioning(
            from_files=bool(combines or replaces or is_real),
            from_lists=listed,
            column=captions.caption_column if combines or replaces else None,
            from_names=not of_class and captions.use_filename_as_label,
            template=captions.prompt_template if combines else CAPTIONS[0],
            may_lack=share.may_lack_captions,
        ),
        generated=prior if of_class and not of_subject and share.generates and not is_real else None,
        count=prior.num_class_images if is_real else None,
        background=data.transparent_background,
        masked=group == INSTANCE and bool(data.mask_dir or data.alpha_mask),
        mask_folder=Path(data.mask_dir) if data.mask_dir and group == INSTANCE else None,
    )


def read_concepts(sources: Sequence[Source], tell: Tell = tell) -> list[Concept]:
    """The subjects, and the classes as far as they are there already. Raises DataError if there is no subject, or a
    picture or caption is damaged or missing."""
    to_come = numbers_to_come(sources)
    wanted = [(one, one.generated and one.generated.num_class_images) for one in sources]
    there = [one for one, count in wanted if not count or len(to_come[str(one.folder)]) < count]
    concepts = [replace(one.concept, records=one.records(tell)) for one in there]
    is_several = len(sources) > 1 and sources[1].concept.group == INSTANCE
    for source, concept in zip(there, concepts, strict=True) if is_several else ():
        tell(f"{concept.name}: {count_of(len(concept.records), 'picture')} of {source.folder}, {source.prompt!r}")
    return concepts


def numbers_to_come(sources: Sequence[Source]) -> dict[str, list[int]]:
    """The numbers of the class pictures that are yet to be sampled, by their folder, which classes may share."""
    generated = {str(one.folder): one.generated.num_class_images for one in sources if one.generated}
    return {folder: missing_numbers(Path(folder), count) for folder, count in generated.items()}


def tell_cut_prompts(job: TrainingJob, class_prompts: Sequence[str], tell: Tell = tell) -> None:
    """Tell what is lost of prompts that are too long: of captions their files."""
    tokenizer, shared = PromptTokenizer(job.base.text), [*class_prompts]
    for concept in job.concepts:
        if not concept.has_captions:
            shared += concept.records[0].captions
            continue
        long = [one.path for one in concept.records if any(map(tokenizer.lost, one.captions))]
        for line in told({f"captions of more than {tokenizer.length} tokens, the rest is not read": long}):
            tell(line)
    tokenizer.texts(shared)  # Warns of each by itself.


def check_words(job: TrainingJob) -> None:
    """Raise ConfigError of a new word that no prompt and no caption of the subjects holds: nothing would be learnt."""
    words, subjects = job.config.words.words, job.subjects
    if not words or not subjects:
        return
    tokenizer = job.base.text[0].tokenizer()
    texts = {text for one in subjects for record in one.records for text in record.captions}
    read = set(chain.from_iterable(map(tokenizer.tokens, texts)))
    if unread := [word for word in words if read.isdisjoint(tokenizer.words[word])]:
        folders = ", ".join(dict.fromkeys(str(one.records[0].path.parent) for one in subjects))
        raise ConfigError(
            f"--modifier_token: {', '.join(unread)}: in no prompt and no caption of {folders}; name the subject by it, "
            f"as in --instance_prompt 'a photo of {unread[0]} dog'"
        )


def starting_words(config: TrainConfig, base: ModelBundle) -> Words:
    """The new words of a run with the vectors that they start from: those of tokens that the base knows, or random ones
    of the deviation of its table, a function of the seed and the word. Raises ConfigError of what is not one token."""
    wanted, found = config.words, dict[str, dict[str, np.ndarray]]()
    usual = OF_CUSTOM_DIFFUSION if config.method.method == "custom_diffusion" else ""
    initial = split_words(wanted.initializer_token or usual)
    for reader in base.text if wanted.words else ():
        tokenizer = reader.tokenizer()
        table = read_value(base.opened().tensors[f"{reader.name}.{TABLE}.weight"]).astype(np.float32)
        for word, known in zip_longest(wanted.words, initial[: len(wanted.words)], fillvalue=""):
            ids = tokenizer.tokens(known)
            if len(ids) != 1 and wanted.initializer_token:
                it_is = count_of(len(ids), "token")
                raise ConfigError(f"--initializer_token {known!r}: expected a word that is one token, it is {it_is}")
            if len(ids) != 1 and known and reader is base.text[0]:
                tell(f"{word} starts from random vectors: {known} is no token of this base (--initializer_token)")
            shape = (wanted.num_vectors, table.shape[1])
            drawn = standard_normal(shape, config.run.seed or 0, f"{reader.name} start of {word}") * table.std()
            found.setdefault(word, {})[reader.name] = np.repeat(table[ids], shape[0], 0) if len(ids) == 1 else drawn
    return found

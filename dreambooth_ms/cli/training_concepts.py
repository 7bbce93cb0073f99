"""What a run is to learn: its concepts, by the flags."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from dreambooth_ms.cli.output import tell
from dreambooth_ms.config.train import CAPTIONS, TrainConfig
from dreambooth_ms.data.captions import Captioning, Wording
from dreambooth_ms.data.pictures import told
from dreambooth_ms.data.records import CLASS, INSTANCE, Concept, Source
from dreambooth_ms.data.text import PromptTokenizer
from dreambooth_ms.errors import DataError
from dreambooth_ms.processes.group import Processes
from dreambooth_ms.sampling.picture_file import missing_numbers
from dreambooth_ms.training.content import digests_of
from dreambooth_ms.weights.bundle import ModelBundle


def read_concepts(config: TrainConfig, tell: Callable[[str], object] = tell) -> list[Concept]:
    """The subject, and its class as far as it is there already.

    Raises:
        DataError: there is no subject, or a picture or caption of either is damaged or missing.
    """
    data, prior = config.data, config.prior
    background, captioning = data.transparent_background, partial(_captioning, config)
    subject = Source(
        Path(data.instance_data_dir),
        data.instance_prompt,
        captioning(INSTANCE),
        background=background,
        masked=config.masked,
        mask_folder=Path(data.mask_dir) if data.mask_dir else None,
    )
    concepts = [Concept(INSTANCE, subject.records(tell), wording=_wording(config))]
    if prior.folder and len(class_numbers_to_come(config)) < prior.num_class_images:
        of_class = Source(prior.folder, prior.class_prompt or "", captioning(CLASS), prior.num_class_images, background)
        concepts.append(Concept(CLASS, of_class.records(tell), prior.prior_loss_weight))
    return concepts


def _captioning(config: TrainConfig, name: str) -> Captioning:
    """Where the prompts of the subject's or the class's pictures come from."""
    wanted, is_subject = config.captions, name == INSTANCE
    combines = wanted.read_prompt_from_txt in (name, "both")
    replaces = is_subject and (wanted.use_txt_as_label or (wanted.caption_column and not combines))
    return Captioning(
        from_files=bool(combines or replaces),
        column=wanted.caption_column if combines or replaces else None,
        from_names=is_subject and wanted.use_filename_as_label,
        template=wanted.prompt_template if combines and not wanted.use_txt_as_label else CAPTIONS[0],
    )


def _wording(config: TrainConfig) -> Wording | None:
    """How rows vary the subject's prompts, if they do."""
    wanted = config.captions
    wording = Wording(wanted.caption_dropout, wanted.shuffle_caption, wanted.keep_tokens)
    return None if wording == Wording() else wording


def class_numbers_to_come(config: TrainConfig) -> list[int]:
    """The numbers of the class pictures that are yet to be sampled."""
    return missing_numbers(config.prior.folder, config.prior.num_class_images) if config.prior.folder else []


def check_same_pictures(processes: Processes, concepts: Sequence[Concept]) -> None:
    """Raise DataError if another process, perhaps on another machine, found other pictures, captions or masks."""
    digests = [digest for concept in concepts for digest in digests_of(concept)]
    for rank, others in enumerate(processes.exchange("the list of pictures", digests)):
        if others != digests:
            raise DataError(
                f"rank {rank} found other pictures than rank {processes.rank}; "
                "--instance_data_dir and --class_data_dir must be the same folders on every machine"
            )


def tell_cut_prompts(
    base: ModelBundle, concepts: Sequence[Concept], class_prompt: str, tell: Callable[[str], object] = tell
) -> None:
    """Tell what is lost of prompts that are too long: of captions their files."""
    tokenizer, shared = PromptTokenizer(base.text), [class_prompt]
    for concept in concepts:
        if not concept.has_captions:
            shared += concept.records[0].captions
            continue
        long = [one.path for one in concept.records if any(map(tokenizer.lost, one.captions))]
        for line in told({f"captions of more than {tokenizer.length} tokens, the rest is not read": long}):
            tell(line)
    tokenizer.texts(shared)  # Warns of each by itself.

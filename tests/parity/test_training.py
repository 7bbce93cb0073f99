"""Training is what a plain loop in torch does on the same draws: loss, gradients, and weights after five steps.

The loop is diffusers' UNet and transformers' text encoder, with peft's LoRA, diffusers' processors of Custom Diffusion
or neither, torch's AdamW and clip, and the loss written out group by group.
"""

from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
from mindspore import nn, ops
from peft import LoraConfig
from PIL import Image, ImageOps
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from dreambooth_ms.config.train import LossConfig, MethodConfig
from dreambooth_ms.data.batches import BatchMaker
from dreambooth_ms.data.conditioning import PromptText
from dreambooth_ms.data.plan import Framing, Plan
from dreambooth_ms.data.records import CLASS, INSTANCE, Concept, Record
from dreambooth_ms.diffusion import Columns, NoiseSchedule, NoiseScheduleSpec, draw_columns
from dreambooth_ms.models.clip import end_positions
from dreambooth_ms.models.parameters import PublicParameter, public_parameters
from dreambooth_ms.models.specs import VaeSpec
from dreambooth_ms.training.loop import train
from dreambooth_ms.training.methods import METHODS
from dreambooth_ms.training.optimisers import AdamW, Hyperparameters
from dreambooth_ms.training.step import AccumulatingTrainStep, DiffusionLoss, TrainStep
from dreambooth_ms.weights.bundle import CLIP_TARGETS, open_bundle
from tests.parity.reference import as_drawn, normal, relative_error, worst_gradient_error
from tests.tiny_model import POOLED, write_random_model, write_random_sdxl

RANK, ALPHA, TARGETS = 4, 6, ["to_q", "to_k", "to_v", "to_out.0"]
# Convolutions that keep the size, that halve it and that are pointwise, beside linear layers of every place.
ALL_TARGETS = [*TARGETS, "proj", "net.2", "time_emb_proj", "proj_in", "proj_out", "conv1", "conv2", "conv"]
# Latents are not square, so that no axis passes for another.
LATENTS, TEXT, SDXL_TEXT_SHAPE, SCALING_FACTOR = (4, 8, 12), (7, 24), (7, 24 + 16), 0.5
STEPS, LEARNING_RATE, MAX_GRAD_NORM, PRIOR_LOSS_WEIGHT = 5, 1e-3, 0.005, 0.7
TEXT_RATE_FACTOR, TEXT_DECAY_FACTOR, GAMMA = 0.3, 0.1, 1.5
HYPERPARAMETERS = Hyperparameters()

# Float32 sums in another order, through the network's thirty layers: measured 1.3e-7.
LOSS = 1e-5
# The same forward and backward, relative to the largest gradient of the matrix: measured 1.2e-5.
GRADIENT = 1e-4
# Adam divides a gradient by its own size, so where it is mostly rounding, so is a whole step. All weights together,
# relative to the way they have gone: measured 1e-4. One weight, as a part of the longest way: measured 4e-3.
ALL_WEIGHTS = 5e-4
ONE_WEIGHT = 2e-2 * LEARNING_RATE * STEPS


@dataclass(frozen=True)
class Trained:
    """What is trained, to predict what."""

    method: str = "lora"
    text: bool = False
    kind: str = "epsilon"
    sdxl: bool = False
    convolutions: bool = False
    words: int = 0
    """New words that are trained too."""
    freeze_model: str = "crossattn_kv"
    """Of Custom Diffusion: or crossattn."""
    weight_decay: float = HYPERPARAMETERS.weight_decay

    @property
    def targets(self):
        return ALL_TARGETS if self.convolutions else TARGETS

    @property
    def encodes_text(self):
        return self.text or self.words > 0

    def __str__(self):
        what = f"{self.method}{' and text encoder' if self.text else ''}{' of all layers' if self.convolutions else ''}"
        what += f" and {self.words} words" if self.words else ""
        what += " by crossattn" if self.freeze_model == "crossattn" else ""
        return f"{what}, SDXL" if self.sdxl else f"{what}, {self.kind}"


@dataclass(frozen=True)
class Case:
    """Pictures of the subject per batch, whether as many of the class come with them, and how rows are weighted."""

    trained: Trained
    batch_size: int
    prior: bool
    min_snr: bool = False
    batches_per_step: int = 1

    def __str__(self):
        rows = f"{self.batch_size}{'+' + str(self.batch_size) if self.prior else ''} rows"
        times = f"{self.batches_per_step} x " if self.batches_per_step > 1 else ""
        return f"{times}{rows}{', min-SNR' if self.min_snr else ''}, {self.trained}"


LORA, LORA_V = Trained(), Trained(kind="v_prediction")
LORA_OF_ALL_LAYERS = Trained(convolutions=True)
LORA_TEXT, LORA_TEXT_V = Trained(text=True), Trained(text=True, kind="v_prediction")
FULL, FULL_V = Trained("full"), Trained("full", kind="v_prediction")
SDXL, SDXL_TEXT, SDXL_FULL = Trained(sdxl=True), Trained(text=True, sdxl=True), Trained("full", sdxl=True)
FULL_TEXT, FULL_TEXT_V = Trained("full", text=True), Trained("full", text=True, kind="v_prediction")
# With a decay that would move what it should not.
CUSTOM = Trained("custom_diffusion", words=2, weight_decay=1.0)
CUSTOM_ALL = replace(CUSTOM, freeze_model="crossattn")
SDXL_CUSTOM = replace(CUSTOM, sdxl=True)
INVERSION = Trained("textual_inversion", words=2, weight_decay=1.0)
LORA_WORDS = Trained(words=2, weight_decay=1.0)

# Every number of rows is compiled once for what is trained. Any two of the choices meet in some case.
CASES = [
    Case(LORA, 1, False),
    Case(LORA, 2, False, min_snr=True),
    Case(LORA, 1, True),
    Case(LORA, 3, False),
    Case(LORA, 3, True),
    Case(LORA_V, 2, True, min_snr=True),
    Case(LORA_V, 1, True, min_snr=True, batches_per_step=2),
    Case(LORA_OF_ALL_LAYERS, 1, True),
    Case(LORA_TEXT, 1, True, min_snr=True),
    Case(LORA_TEXT, 2, False),
    Case(LORA_TEXT_V, 3, False, min_snr=True),
    Case(FULL, 3, False, min_snr=True),
    Case(FULL_V, 1, True),
    Case(FULL_V, 2, False, min_snr=True),
    Case(FULL_TEXT, 1, True),
    Case(FULL_TEXT, 2, False, min_snr=True),
    Case(FULL_TEXT_V, 3, False),
    Case(FULL_TEXT, 1, False, min_snr=True, batches_per_step=2),
    Case(SDXL, 1, True),
    Case(SDXL, 2, False, min_snr=True),
    Case(SDXL, 3, True),
    Case(SDXL_TEXT, 1, True, min_snr=True),
    Case(SDXL_FULL, 2, False),
    Case(CUSTOM, 1, True),
    Case(CUSTOM, 1, False, batches_per_step=2),
    Case(CUSTOM_ALL, 2, False, min_snr=True),
    Case(SDXL_CUSTOM, 1, True),
    Case(INVERSION, 1, True),
    Case(LORA_WORDS, 2, False),
]


def concept(name, count, weight=1.0):
    """Pictures of which no two have the same size, in either concept."""
    longer = 7 * (name == CLASS)
    records = (
        Record(Path(f"{name}-{i}.png"), f"{name} {i}", (50 + longer, 60 + 9 * i), (f"{name} prompt {i}",))
        for i in range(count)
    )
    return Concept(name, tuple(records), weight)


def plan_of(batch_size, prior, batches_per_step=1):
    """Five pictures of the subject and two of the class, each with a prompt of its own."""
    concepts = (concept(INSTANCE, 5), concept(CLASS, 2, PRIOR_LOSS_WEIGHT))
    framing = Framing(((32, 32),), False, True)
    return Plan(concepts if prior else concepts[:1], batch_size, framing, 5, batches_per_step)


def batches_of(plan, objective, posterior, text, num_add_time_ids=0):
    """Batches from a posterior and a text for each record."""
    known = known_records(plan)
    texts = {caption: PromptText(*text(i)) for i, record in enumerate(known) for caption in record.captions}
    return BatchMaker(
        plan=plan,
        posteriors=lambda view: posterior(known.index(view.record)),
        texts=texts.__getitem__,
        objective=objective,
        scaled=VaeSpec(scaling_factor=SCALING_FACTOR).scaled,
        num_add_time_ids=num_add_time_ids,
    )


def known_records(plan):
    return [record for of in plan.concepts for record in of.records]


class Training:
    """Our networks of a model folder with their compiled steps; every run starts anew."""

    def __init__(self, path, trained):
        folder = open_bundle(path)
        words = {
            f"<new{i}>": {one.name: normal(1, one.width, seed=i) for one in folder.text} for i in range(trained.words)
        }
        folder = folder.with_words(words)
        self.path, self.trained = path, trained
        self.spec = folder.schedule.trained()
        self.vocabulary, self.num_add_time_ids = folder.text[0].spec.vocab_size, folder.num_add_time_ids
        text_encoders = folder.load_text_encoders() if trained.encodes_text else None
        networks = {"unet": folder.denoiser.load()} | (text_encoders.networks() if text_encoders else {})
        self.networks = networks
        config = MethodConfig(
            method=trained.method,
            train_text_encoder=trained.text,
            rank=RANK,
            lora_alpha=ALPHA,
            lora_target_modules=trained.targets,
            freeze_model=trained.freeze_model,
        )
        self.learner = METHODS[trained.method](config, folder, networks["unet"], text_encoders, 0)
        public = {
            id(one.parameter): (f"{network}.{name}", one)
            for network, cell in networks.items()
            for name, one in public_parameters(cell).items()
        }
        self.parameters = dict(public[id(parameter)] for parameter in self.learner.parameters)
        if trained.method == "lora":
            # Both factors away from zero, so that both have gradients.
            self.start = {
                name: 0.2 * normal(*one.shape, seed=i) for i, (name, one) in enumerate(self.parameters.items())
            }
        else:
            self.start = self.weights()
        rates, decays = (
            [1.0 if one.kind == "unet" else factor for one in self.learner.trainables]
            for factor in (TEXT_RATE_FACTOR, TEXT_DECAY_FACTOR)
        )
        hyperparameters = replace(HYPERPARAMETERS, weight_decay=trained.weight_decay)
        self.optimiser = AdamW(self.learner.parameters, hyperparameters, rates, decays)
        self.loss = DiffusionLoss(self.learner.denoiser)
        self.step_cells = {}

    def batches(self, case):
        return batches_of(
            plan_of(case.batch_size, case.prior, case.batches_per_step),
            draw_columns(self.spec, LossConfig(snr_gamma=GAMMA if case.min_snr else None)),
            posterior=lambda i: normal(2, *LATENTS, seed=i),
            text=self.token_ids if self.trained.encodes_text else self.embedding,
            num_add_time_ids=self.num_add_time_ids,
        )

    def embedding(self, number):
        if self.trained.sdxl:
            return normal(*SDXL_TEXT_SHAPE, seed=20 + number), normal(POOLED, seed=20 + number)
        return (normal(*TEXT, seed=20 + number),)

    def token_ids(self, number):
        """Of SDXL, for two encoders, with an end token that is not at the same place in all prompts.

        Each has one of the new words, if there are any; every third begins with it.
        """
        rng, end = np.random.default_rng(number), self.vocabulary - 1
        place = np.arange(1 + self.trained.sdxl) * TEXT[0] + number % 3 if self.trained.words else []
        word = self.vocabulary + number % max(self.trained.words, 1)
        if not self.trained.sdxl:
            ids = rng.integers(self.vocabulary, size=TEXT[0], dtype=np.int32)
            ids[place] = word
            return (ids,)
        ids = rng.integers(end, size=2 * TEXT[0], dtype=np.int32)
        ids[-1 - number % 3] = end
        ids[place] = word
        return ids, end_positions(ids[None, TEXT[0] :], end)[0]

    def step_cell(self, batches_per_step):
        """The step that takes so many batches."""
        if batches_per_step not in self.step_cells:
            penalty = self.penalty_of_a_batch(batches_per_step)
            step = TrainStep(self.loss, self.learner.parameters, self.optimiser, MAX_GRAD_NORM, penalty=penalty)
            self.step_cells[batches_per_step] = step if batches_per_step == 1 else AccumulatingTrainStep(step)
        return self.step_cells[batches_per_step]

    def penalty_of_a_batch(self, batches_per_step):
        """A part of the loss of each batch."""

    def as_trained(self, batches):
        """What steps take of batches as they are made."""
        return batches

    def run(self, batches):
        for name, one in self.parameters.items():
            one.write(self.start[name])
        for moment in self.optimiser.moments():
            moment.set_data(0 * moment)
        base = self.base()
        reports, gradients, per_step = [], [], batches.plan.batches_per_step

        def keep_gradients(report):
            if report.step == 1:
                gradients.append(self.first_gradients())

        hooks = [reports.append, keep_gradients]
        train(
            self.step_cell(per_step),
            self.as_trained(batches),
            per_step,
            lambda step: LEARNING_RATE,
            range(STEPS),
            hooks,
        )
        return SimpleNamespace(
            reports=reports, gradients=gradients[0], weights=self.weights(), base_before=base, base_after=self.base()
        )

    def weights(self):
        return {name: one.read() for name, one in self.parameters.items()}

    def first_gradients(self):
        """The clipped gradients of the first step: (1 - beta1) times them are its first moments."""
        named = zip(self.parameters.items(), self.optimiser.first_moments, strict=True)
        return {
            name: PublicParameter(moment, one.layout).read() / (1 - HYPERPARAMETERS.beta1)
            for (name, one), moment in named
        }

    def base(self):
        """The bits of everything that is not trained."""
        trained = {id(parameter) for parameter in self.learner.parameters}
        parameters = self.learner.denoiser.get_parameters()
        return {p.name: p.asnumpy().tobytes() for p in parameters if id(p) not in trained}


class WithWords(torch.nn.Module):
    """A frozen table of tokens and the rows behind it, looked up as one table."""

    def __init__(self, table, count):
        super().__init__()
        self.table = table.requires_grad_(False)
        self.new_rows = torch.nn.Parameter(torch.empty(count, table.embedding_dim))

    def forward(self, ids):
        return torch.nn.functional.embedding(ids, torch.cat([self.table.weight, self.new_rows]))


def custom_diffusion_processors(unet, trains_all):
    """diffusers' processors, as its script makes them -> their trained parameters, by the names of the layers' own."""
    leaves = {"to_k": "to_k_custom_diffusion", "to_v": "to_v_custom_diffusion"}
    leaves |= {"to_q": "to_q_custom_diffusion", "to_out.0": "to_out_custom_diffusion.0"} if trains_all else {}
    processors, named = {}, {}
    for name in unet.attn_processors:
        layer, attention = name.removesuffix(".processor"), unet.get_submodule(name.removesuffix(".processor"))
        crosses = layer.endswith("attn2")
        sizes = {"hidden_size": attention.to_q.in_features, "cross_attention_dim": attention.to_k.in_features}
        processors[name] = CustomDiffusionAttnProcessor(crosses, crosses and trains_all, **sizes)
        for own, leaf in leaves.items() if crosses else ():
            parameters = processors[name].get_submodule(leaf).named_parameters()
            named |= {f"{layer}.{own}.{parameter}": value for parameter, value in parameters}
    unet.set_attn_processor(processors)
    return named


class Reference:
    """The networks of a model folder in torch, to be trained from chosen weights.

    Custom Diffusion's weights are trained in place instead of in diffusers' processors if `in_place`: then the first
    token has a gradient too.
    """

    def __init__(self, path, trained, start, in_place=False):
        self.unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet")
        kinds = {"text_encoder": CLIPTextModel} | (
            {"text_encoder_2": CLIPTextModelWithProjection} if trained.sdxl else {}
        )
        self.text_encoders = {
            name: kind.from_pretrained(path, subfolder=name) for name, kind in kinds.items() if trained.encodes_text
        }
        self.scheduler = DDPMScheduler.from_pretrained(path, subfolder="scheduler")
        self.kind = trained.kind
        self.parameters = {}
        for name, network in {"unet": self.unet, **self.text_encoders}.items():
            targets = trained.targets if name == "unet" else list(CLIP_TARGETS)
            if trained.method != "full":
                network.requires_grad_(False)
            if trained.method == "lora" and (name == "unet" or trained.text):
                network.add_adapter(
                    LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, init_lora_weights=False)
                )
            if trained.words and name != "unet":
                embeddings = network.text_model.embeddings
                embeddings.token_embedding = WithWords(embeddings.token_embedding, trained.words)
            own = {key.replace(".default.", "."): p for key, p in network.named_parameters() if p.requires_grad}
            if trained.method == "custom_diffusion" and name == "unet":
                known = {
                    key: p.requires_grad_(in_place) for key, p in network.named_parameters() if f"unet.{key}" in start
                }
                own = known if in_place else custom_diffusion_processors(network, trained.freeze_model == "crossattn")
            self.parameters |= {f"{name}.{key}": p for key, p in own.items()}
        # What the prediction does not depend on has no gradient, and torch's optimiser leaves it alone.
        self.unread = {name: self.parameters.pop(name) for name in self.parameters.keys() - start.keys()}
        assert self.parameters.keys() == start.keys()
        assert bool(self.unread) == (trained.sdxl and trained.text)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(torch.tensor(start[name]))

    def row_errors(self, batch):
        """Mean squared error of each row of a batch as it was drawn: latents in, noise out."""
        latents, noise = map(torch.tensor, (batch.inputs["sample"], batch.target))
        text, added = self.conditioning(batch)
        timesteps = torch.tensor(batch.inputs["timestep"]).long()
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        prediction = self.unet(noisy, timesteps, text, added_cond_kwargs=added).sample
        target = noise if self.kind == "epsilon" else self.scheduler.get_velocity(latents, noise, timesteps)
        return ((prediction - target) ** 2).mean((1, 2, 3))

    def conditioning(self, batch):
        """What the UNet reads: text, and for SDXL pooled text and the numbers of the pictures."""
        read = {name: torch.tensor(rows) for name, rows in batch.inputs.items()}
        text, pooled = read["input_ids" if self.text_encoders else "encoder_hidden_states"], read.get("text_embeds")
        text, pooled = self.encoded(text, pooled)
        return text, {"text_embeds": pooled, "time_ids": read["time_ids"]} if "time_ids" in read else None

    def encoded(self, text, pooled=None):
        """Token ids as the UNet reads them, with pooled text of SDXL; what is encoded already as it is."""
        if len(self.text_encoders) == 1:
            text = self.text_encoders["text_encoder"](text.long()).last_hidden_state
        elif self.text_encoders:
            ids, ids_2 = text.long().chunk(2, 1)
            first = self.text_encoders["text_encoder"](ids, output_hidden_states=True)
            second = self.text_encoders["text_encoder_2"](ids_2, output_hidden_states=True)
            text, pooled = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], 2), second.text_embeds
        return text, pooled

    def min_snr(self, timesteps):
        """Hang et al., 2023, equation 11 and its form for the velocity."""
        alphas = self.scheduler.alphas_cumprod[torch.tensor(timesteps).long()]
        snr = alphas / (1 - alphas)
        return snr.clamp(max=GAMMA) / (snr if self.kind == "epsilon" else snr + 1)


def optimiser_of(reference, trained, text_rate_factor=TEXT_RATE_FACTOR):
    """torch's AdamW, with a rate and a decay of their own for the text encoders."""
    groups = [
        {
            "params": [p for name, p in reference.parameters.items() if name.startswith("unet.") == of_unet],
            "lr": rate,
            "weight_decay": decay * trained.weight_decay,
        }
        for of_unet, rate, decay in (
            (True, LEARNING_RATE, 1.0),
            (False, text_rate_factor * LEARNING_RATE, TEXT_DECAY_FACTOR),
        )
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]])


def run_reference(
    training,
    batches,
    case,
    text_rate_factor=TEXT_RATE_FACTOR,
    steps=STEPS,
    change=lambda batch: batch,
    in_place=False,
    kind=Reference,
    penalty=lambda trained: 0.0,
):
    """The same steps in torch on the same draws, each of one batch, which is changed first."""
    reference = kind(training.path, case.trained, training.start, in_place)
    drawn = replace(batches, objective=as_drawn(batches.objective))
    trained, optimiser = reference.parameters, optimiser_of(reference, case.trained, text_rate_factor)
    reports, gradients = [], None
    for step in range(steps):
        batch = change(drawn(step))
        errors = reference.row_errors(batch)
        weighted = errors * reference.min_snr(batch.inputs["timestep"]) if case.min_snr else errors
        size = case.batch_size
        loss, losses = weighted[:size].mean(), {INSTANCE: errors[:size].mean()}
        if case.prior:
            loss = loss + PRIOR_LOSS_WEIGHT * weighted[size:].mean()
            losses[CLASS] = errors[size:].mean()
        loss = loss + penalty(trained)
        optimiser.zero_grad()
        loss.backward()
        assert all(parameter.grad is None for parameter in reference.unread.values())
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), MAX_GRAD_NORM)
        gradients = gradients or {name: parameter.grad.numpy().copy() for name, parameter in trained.items()}
        optimiser.step()
        concept_losses = {group: value.item() for group, value in losses.items()}
        reports.append(SimpleNamespace(loss=loss.item(), concept_losses=concept_losses, grad_norm=norm.item()))
    weights = {name: parameter.detach().numpy() for name, parameter in trained.items()}
    return SimpleNamespace(reports=reports, gradients=gradients, weights=weights)


@pytest.fixture(scope="module")
def training_of(tmp_path_factory):
    """What is trained -> the training; each is built once."""

    @cache
    def path(kind, levels):
        folder = tmp_path_factory.mktemp(kind)
        if kind == "sdxl":
            return write_random_sdxl(folder, levels=levels)
        return write_random_model(folder, prediction_type=kind, sd2=kind == "v_prediction", levels=levels)

    return cache(lambda trained, levels=2: Training(path("sdxl" if trained.sdxl else trained.kind, levels), trained))


@pytest.fixture(scope="module", params=CASES, ids=str)
def compared(request, training_of):
    """Our run and torch's, which has all rows of a step in one batch."""
    case = request.param
    training = training_of(case.trained, levels_of(case))
    compiled_before = compilations(training, case)
    ours = training.run(training.batches(case))
    compiled = compilations(training, case) - compiled_before
    case = in_one_batch(case)
    batches = training.batches(case)
    return SimpleNamespace(
        case=case,
        training=training,
        compiled=compiled,
        ours=ours,
        batches=batches,
        reference=run_reference(training, batches, case),
    )


def levels_of(case):
    """Of the UNet: both for some of what trains every layer; the others are there for their rows, or their text."""
    return 2 if case.trained in (LORA_OF_ALL_LAYERS, FULL, SDXL_FULL) else 1


def in_one_batch(case):
    return replace(case, batch_size=case.batch_size * case.batches_per_step, batches_per_step=1)


def compilations(training, case):
    cell = training.step_cell(case.batches_per_step)
    return len((cell if case.batches_per_step == 1 else cell._add_gradients).compile_cache)


def pairs(compared):
    return zip(compared.ours.reports, compared.reference.reports, strict=True)


def test_the_loss_of_every_step_is_torchs(compared):
    for ours, reference in pairs(compared):
        assert ours.loss == pytest.approx(reference.loss, rel=LOSS)
        assert ours.concept_losses == pytest.approx(reference.concept_losses, rel=LOSS)
    print(f"loss {max(abs(ours.loss / reference.loss - 1) for ours, reference in pairs(compared)):.1e}")


def test_the_gradients_of_all_trained_weights_are_torchs(compared):
    """After the clip, which is in force in every step."""
    ours, expected = compared.ours.gradients, compared.reference.gradients
    if compared.case.trained.method == "lora":
        worst = max(relative_error(gradient, expected[name]) for name, gradient in ours.items())
    else:
        worst, _ = worst_gradient_error(ours, expected)
    print(f"gradients {worst:.1e}")
    assert worst < GRADIENT
    for ours, reference in pairs(compared):
        assert reference.grad_norm > MAX_GRAD_NORM
        assert ours.grad_norm == pytest.approx(reference.grad_norm, rel=LOSS)


def differences(weights, expected, start):
    """How far weights are from others: all of them relative to the others' way from the start, and the largest."""
    ours, reference, start = (
        np.concatenate([values[name].ravel() for name in start]).astype(np.float64)
        for values in (weights, expected, start)
    )
    return np.linalg.norm(ours - reference) / np.linalg.norm(reference - start), np.abs(ours - reference).max()


def test_the_weights_after_five_steps_are_torchs(compared):
    all_weights, one = differences(compared.ours.weights, compared.reference.weights, compared.training.start)
    print(f"all weights {all_weights:.1e}, one {one:.1e}")
    assert all_weights < ALL_WEIGHTS
    assert one < ONE_WEIGHT


def test_a_mistake_in_rows_weights_or_rates_would_show(compared):
    case, training, batches = compared.case, compared.training, compared.batches
    other = run_reference(training, batches, replace(case, min_snr=not case.min_snr))
    losses = zip(other.reports, compared.reference.reports, strict=True)
    assert max(abs(one.loss / expected.loss - 1) for one, expected in losses) > 10 * LOSS
    if case.batch_size > 1 or case.prior:
        for field in read_fields(case.trained):
            other = run_reference(training, batches, case, steps=1, change=partial(with_next_rows, field))
            assert worst_gradient_error(other.gradients, compared.reference.gradients)[0] > 10 * GRADIENT
    if case.trained.encodes_text:
        other = run_reference(training, batches, case, text_rate_factor=1.0)
        all_weights, _ = differences(other.weights, compared.reference.weights, training.start)
        assert all_weights > 10 * ALL_WEIGHTS
    if case.trained.method == "custom_diffusion":
        other = run_reference(training, batches, case, steps=1, in_place=True)
        assert worst_gradient_error(other.gradients, compared.reference.gradients)[0] > 10 * GRADIENT


def read_fields(trained):
    """What the reference reads of the rows' conditioning: it finds the ends of token ids by itself."""
    text = "input_ids" if trained.encodes_text else "encoder_hidden_states"
    if not trained.sdxl:
        return (text,)
    return (text, "time_ids") if trained.encodes_text else (text, "text_embeds", "time_ids")


def with_next_rows(field, batch):
    return replace(batch, inputs=batch.inputs | {field: np.roll(batch.inputs[field], 1, axis=0)})


def test_training_leaves_every_bit_of_the_base_as_it_was(compared):
    assert (len(compared.ours.base_before) > 100) == (compared.case.trained.method != "full")
    assert compared.ours.base_after == compared.ours.base_before
    tables = [name for name in compared.ours.base_before if name.endswith("token_embedding.weight")]
    encoders = len(compared.training.networks) - 1
    assert len(tables) == (encoders if compared.case.trained.method != "full" else 0)


def test_five_steps_of_one_shape_are_compiled_once(compared):
    assert compared.compiled <= 1


def test_new_words_are_trained_in_every_text_encoder(compared):
    trained, (sizes, gradients) = (
        compared.case.trained,
        (
            {name: values for name, values in of.items() if name.endswith("token_embedding.new_rows")}
            for of in (compared.training.start, compared.ours.gradients)
        ),
    )
    of_each = (24, 16) if trained.sdxl else (24,)
    assert [values.shape for values in sizes.values()] == [(trained.words, width) for width in of_each if trained.words]
    assert all(np.abs(values).max() > 0 for values in gradients.values())


@pytest.mark.parametrize("case", [case for case in CASES if case.batches_per_step > 1], ids=str)
def test_a_step_of_several_batches_is_one_of_a_larger_batch(training_of, case):
    training = training_of(case.trained, levels_of(case))
    several, one = (training.run(training.batches(form)) for form in (case, in_one_batch(case)))
    for ours, expected in zip(several.reports, one.reports, strict=True):
        assert ours.loss == pytest.approx(expected.loss, rel=LOSS)
        assert ours.concept_losses == pytest.approx(expected.concept_losses, rel=LOSS)
        assert ours.grad_norm == pytest.approx(expected.grad_norm, rel=LOSS)
    all_weights, furthest = differences(several.weights, one.weights, training.start)
    print(f"all weights {all_weights:.1e}, one {furthest:.1e}")
    assert all_weights < ALL_WEIGHTS
    assert furthest < ONE_WEIGHT


def test_a_batch_is_named_as_its_denoiser_reads_it(compared):
    names = tuple(compared.batches(0).inputs)
    assert names == compared.training.learner.denoiser.input_names
    assert len(names) == (5 if compared.case.trained.sdxl else 3)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_row_keeps_its_own_picture_prompt_noise_level_and_weight(batch_size):
    """Pictures and prompts are their own numbers here, so that each row says what it is made of."""
    plan = plan_of(batch_size, prior=True)
    make_batch = batches_of(
        plan,
        weighted_by_time,
        # A log-variance of -60 leaves the mean as it is.
        posterior=lambda i: np.stack([np.full(LATENTS, i, np.float32), np.full(LATENTS, -60, np.float32)]),
        text=lambda i: (np.full(TEXT, 100 + i, np.float32), np.full(3, 200 + i, np.float32)),
        num_add_time_ids=6,
    )
    make_drawn = replace(make_batch, objective=as_drawn(weighted_by_time))
    known = known_records(plan)
    used, seen, noise = set(), set(), []
    for step in range(10):
        batch, drawn = make_batch(step), make_drawn(step)
        assert batch.concepts == (INSTANCE,) * batch_size + (CLASS,) * batch_size
        assert {len(field) for field in (batch.target, batch.weight, *batch.inputs.values())} == {2 * batch_size}
        for row, (of, _, view) in enumerate(plan.rows(step)):
            number = known.index(view.record)
            read = {name: rows[row] for name, rows in batch.inputs.items()}
            latents = drawn.inputs["sample"][row]
            assert (np.abs(latents - number * SCALING_FACTOR) < 1e-6).all()
            assert (read["encoder_hidden_states"] == 100 + number).all()
            assert (read["text_embeds"] == 200 + number).all()
            (width, height), (top, left) = view.record.size, corner(view)
            assert read["time_ids"].tolist() == [height, width, top, left, 32, 32]
            seen |= {("mirrored", view.flip), ("below the top", top > 0), ("right of the left", left > 0)}
            assert batch.concepts[row] == of.name
            timestep = int(read["timestep"])
            weight = (1.0 if number < 5 else PRIOR_LOSS_WEIGHT) * (1 + timestep / 1000)
            assert batch.weight[row] == np.float32(weight / batch_size)
            alpha = SCHEDULE.alphas_cumprod[timestep]
            noisy = alpha**0.5 * latents + (1 - alpha) ** 0.5 * batch.target[row]
            assert read["sample"] == pytest.approx(noisy, rel=1e-5, abs=1e-5)
            used.add(number)
            noise.append(batch.target[row].tobytes())
    assert used == set(range(7))
    assert {("mirrored", True), ("mirrored", False), ("below the top", True)} <= seen
    assert len(set(noise)) == len(noise)


SCHEDULE = NoiseSchedule.from_spec(NoiseScheduleSpec())


def weighted_by_time(generators):
    """The noise is predicted, and rows weigh 1 to 2 by their timestep."""
    columns = draw_columns(NoiseScheduleSpec())(generators)
    return replace(columns, weight=1 + columns.time / 1000)


class Readout(nn.Cell):
    """A denoiser whose prediction can be worked out by hand: noisy latents plus the means of all that it reads."""

    def construct(self, noisy_BCHW, timesteps_B, text, pooled, add_time_ids):
        told_B = text.mean((1, 2)) + pooled.mean(1) + add_time_ids.mean(1) + timesteps_B * 0.001
        return noisy_BCHW + ops.broadcast_to(ops.reshape(told_B, (-1, 1, 1, 1)), noisy_BCHW.shape)


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_loss_of_sdxl_is_the_one_computed_by_hand(batch_size, prior, pynative):
    """Picture by picture, in float64, from the plan alone: no row may take another's prompt, pooled text or numbers."""
    plan = plan_of(batch_size, prior)
    known = known_records(plan)
    texts = {record: (normal(*SDXL_TEXT_SHAPE, seed=i), normal(POOLED, seed=i)) for i, record in enumerate(known)}
    make_batch = batches_of(
        plan,
        weighted_by_time,
        posterior=lambda i: normal(2, *LATENTS, seed=i),
        text=lambda i: texts[known[i]],
        num_add_time_ids=6,
    )
    make_drawn = replace(make_batch, objective=as_drawn(weighted_by_time))
    loss_cell = DiffusionLoss(Readout())
    for step in range(3):
        drawn, expected = make_drawn(step), 0.0
        for row, (of, _, view) in enumerate(plan.rows(step)):
            (text, pooled), (width, height) = texts[view.record], view.record.size
            latents, noise = drawn.inputs["sample"][row], drawn.target[row]
            timestep = int(drawn.inputs["timestep"][row])
            conditioning = text.astype(float).mean() + pooled.astype(float).mean() + timestep * 0.001
            conditioning += np.mean([height, width, *corner(view), 32, 32])
            alpha = SCHEDULE.alphas_cumprod[timestep]
            noisy = latents * alpha**0.5 + noise * (1 - alpha) ** 0.5
            error = np.mean((noisy + conditioning - noise) ** 2)
            weight = PRIOR_LOSS_WEIGHT if of.name == CLASS else 1.0
            expected += weight * (1 + timestep / 1000) * error / batch_size
        loss, _ = loss_cell(*make_batch(step).tensors())
        assert float(loss.asnumpy()) == pytest.approx(expected, rel=1e-5)


def clean_latents(generators):
    """A toy objective: the clean latents from latents with noise of a strength from 0 to 3, which is also the time."""
    strength = np.array([3 * rng.random() for rng in generators])
    ones = np.ones(len(strength))
    return Columns(in_x=ones, in_n=strength, out_x=ones, out_n=0 * ones, time=strength, weight=1 / (1 + strength))


def test_an_objective_is_one_function(training_of):
    """The step that predicts noise takes it as it is: its loss is that of diffusers' network on such rows."""
    case, training = Case(LORA, 2, False), training_of(LORA, 1)
    batches = replace(training.batches(case), objective=clean_latents)
    report = training.run(batches).reports[0]
    batch, drawn = batches(0), replace(batches, objective=as_drawn(clean_latents))(0)
    latents, noise, strength = drawn.inputs["sample"], drawn.target, batch.inputs["timestep"]
    assert (strength % 1 != 0).all()
    sample = latents + strength.reshape(-1, 1, 1, 1) * noise
    network = Reference(training.path, case.trained, training.start)
    text, _ = network.conditioning(batch)
    with torch.no_grad():
        prediction = network.unet(torch.tensor(sample), torch.tensor(strength), text).sample.numpy()
    errors = ((prediction - latents) ** 2).mean((1, 2, 3))
    assert report.concept_losses[INSTANCE] == pytest.approx(errors.mean(), rel=LOSS)
    assert report.loss == pytest.approx((errors / (1 + strength)).mean(), rel=LOSS)


def corner(view):
    """Top and left of the crop as diffusers' script has them: it resizes, mirrors, and crops the outcome."""
    width, height = view.record.size
    shortest = min(width, height)
    resized = Image.new("L", (32 * width // shortest, 32 * height // shortest))
    resized.putpixel((view.frame.left, view.frame.top), 255)
    resized.putpixel((view.frame.left + 31, view.frame.top), 254)
    levels = np.asarray(ImageOps.mirror(resized) if view.flip else resized)
    top, left = np.argwhere(levels >= 254).min(0)
    return int(top), int(left)

"""The optimiser that a configuration asks for, on what a method trains."""

from collections.abc import Sequence

from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.training.adafactor import Adafactor, AdafactorHyperparameters
from dreambooth_ms.training.adamw_8bit import AdamW8bit
from dreambooth_ms.training.methods import Trainable
from dreambooth_ms.training.optimisers import AdamW, AdamWHyperparameters, Optimiser
from dreambooth_ms.training.prodigy import Prodigy, ProdigyHyperparameters


def choose_optimiser(config: TrainConfig, trainables: Sequence[Trainable]) -> Optimiser:
    """The optimiser, with the learning rate and weight decay of text encoders as factors of the others'."""
    o, parameters = config.optimiser, [one.parameter for one in trainables]
    text_rate = o.text_encoder_lr / config.learning_rate if o.text_encoder_lr else 1.0
    decay = max(o.adam_weight_decay, config.text_encoder_weight_decay)
    of_text, of_unet = (one / (decay or 1.0) for one in (config.text_encoder_weight_decay, o.adam_weight_decay))
    factors = {"unet": (1.0, of_unet), "text_encoder": (text_rate, of_text)}
    rates, decays = ([factors[one.kind][i] for one in trainables] for i in (0, 1))
    if o.optimizer == "adafactor":
        adafactor = AdafactorHyperparameters(decay, o.adafactor_scale_parameter)
        return Adafactor(parameters, adafactor, rates, decays)
    adam = (o.adam_beta1, o.adam_beta2, decay, o.adam_epsilon)
    if o.optimizer == "prodigy":
        further = (o.prodigy_beta3, o.prodigy_decouple, o.prodigy_use_bias_correction, o.prodigy_safeguard_warmup)
        return Prodigy(parameters, ProdigyHyperparameters(*adam, *further), decay_factors=decays)
    return (AdamW8bit if o.use_8bit_adam else AdamW)(parameters, AdamWHyperparameters(*adam), rates, decays)

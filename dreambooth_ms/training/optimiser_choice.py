"""The optimiser that a configuration asks for, on what a method trains."""

from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.training.adafactor import Adafactor, AdafactorHyperparameters
from dreambooth_ms.training.adamw_8bit import AdamW8bit
from dreambooth_ms.training.methods import Learner
from dreambooth_ms.training.optimisers import AdamW, AdamWHyperparameters, Optimiser
from dreambooth_ms.training.prodigy import Prodigy, ProdigyHyperparameters


def choose_optimiser(config: TrainConfig, learner: Learner) -> Optimiser:
    """The optimiser, with the learning rate and weight decay of text encoders as factors of the others'."""
    o, trainables = config.optimiser, learner.trainables
    text_rate = o.text_encoder_lr / config.learning_rate if o.text_encoder_lr else 1.0
    decay = max(o.adam_weight_decay, config.text_encoder_weight_decay)
    of_text, of_unet = (one / (decay or 1.0) for one in (config.text_encoder_weight_decay, o.adam_weight_decay))
    rates = [text_rate if is_text else 1.0 for is_text in learner.is_of_text_encoder]
    decays = [of_text if is_text else of_unet for is_text in learner.is_of_text_encoder]
    if o.optimizer == "prodigy":
        prodigy = ProdigyHyperparameters(
            o.adam_beta1,
            o.adam_beta2,
            o.prodigy_beta3,
            decay,
            o.adam_epsilon,
            o.prodigy_decouple,
            o.prodigy_use_bias_correction,
            o.prodigy_safeguard_warmup,
        )
        return Prodigy(trainables, prodigy, decays)
    if o.optimizer == "adafactor":
        adafactor = AdafactorHyperparameters(decay, scale_parameter=o.adafactor_scale_parameter)
        return Adafactor(trainables, adafactor, rates, decays)
    adamw = AdamW8bit if o.use_8bit_adam else AdamW
    return adamw(trainables, AdamWHyperparameters(o.adam_beta1, o.adam_beta2, decay, o.adam_epsilon), rates, decays)

"""The optimiser that a configuration asks for, on what a method trains."""

from collections.abc import Sequence

from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.training.adafactor import Adafactor
from dreambooth_ms.training.adamw_8bit import AdamW8bit
from dreambooth_ms.training.methods import Trainable
from dreambooth_ms.training.optimisers import AdamW, Hyperparameters, Optimiser
from dreambooth_ms.training.prodigy import Prodigy


def choose_optimiser(config: TrainConfig, trainables: Sequence[Trainable]) -> Optimiser:
    """The optimiser, with the learning rate and weight decay of text encoders as factors of the others'."""
    o, parameters = config.optimiser, [one.parameter for one in trainables]
    rates = {"unet": 1.0, "text_encoder": o.text_encoder_lr / config.learning_rate if o.text_encoder_lr else 1.0}
    decays = {"unet": o.adam_weight_decay, "text_encoder": config.text_encoder_weight_decay}
    decay = max(decays.values())
    prodigy = (o.prodigy_beta3, o.prodigy_decouple, o.prodigy_use_bias_correction, o.prodigy_safeguard_warmup)
    adam = (o.adam_beta1, o.adam_beta2, decay, o.adam_epsilon)
    kinds = {"AdamW": AdamW8bit if o.use_8bit_adam else AdamW, "adafactor": Adafactor, "prodigy": Prodigy}
    return kinds[o.optimizer](
        parameters,
        Hyperparameters(*adam, *prodigy, o.adafactor_scale_parameter),
        [rates[one.kind] for one in trainables],
        [decays[one.kind] / (decay or 1.0) for one in trainables],
    )

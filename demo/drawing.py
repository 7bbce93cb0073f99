"""Everything the page uses of the toolkit to draw: a model is loaded and compiled once, the rest are inputs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mindspore import Tensor

from demo.messages import Draw, ModelChoice, Phase, Picture, Step
from dreambooth_ms.adapters.lora import load_lora
from dreambooth_ms.cli.assemble import open_base, prompt_tokenizer
from dreambooth_ms.config.schema import DeviceConfig
from dreambooth_ms.data.text import encode_prompts
from dreambooth_ms.sampling.pipeline import Sampler, SamplingSettings, starting_noise, to_pictures
from dreambooth_ms.weights.opened_lora import read_adapters

PURPOSE = "sample"
PREVIEW_SIDE, PREVIEW_SHARE = 512, 0.25


class Painter:
    def __init__(self, model: ModelChoice, send: Callable[[Any], None], job: int) -> None:
        send(Phase(job, "Loading the model"))
        self.folder = folder = open_base(DeviceConfig(), model.base)
        files = [read_adapters(Path(p), lambda: folder.opened().spec) for p in model.loras]
        self.encoders, self.unet, self.vae = folder.load_text_encoders(), folder.load_unet(), folder.load_vae()
        self.tokenizer = prompt_tokenizer(folder)
        networks = {"unet": self.unet, **self.encoders.networks()}
        self.layers = [
            l for n, net in networks.items() for l in load_lora(net, [f[n] for f in files if n in f], 1.0).values()
        ]
        self.samplers = {}

    def draw(self, asked: Draw, send, cancelled) -> bool:
        drawing = asked.drawing
        for number in range(drawing.count):
            for side in drawing.sides:
                scale = max(drawing.lora_scales, default=0.0) if side == "adapted" else 0.0
                for layer in self.layers:
                    layer.set_scale(scale)
                texts = {
                    p: encode_prompts(self.tokenizer, self.encoders, [p], 1)[p]
                    for p in (drawing.prompt, drawing.negative_prompt)
                }
                shape = self.folder.latent_shape(drawing.height, drawing.width)
                if shape not in self.samplers:
                    send(Phase(asked.job, "Preparing the model for this size"))
                    self.samplers[shape] = Sampler(
                        self.unet,
                        self.vae,
                        self.folder.scheduler_config,
                        SamplingSettings(
                            drawing.scheduler, drawing.num_inference_steps, max(drawing.guidance_scale, 1.01), 1
                        ),
                    )
                sampler = self.samplers[shape]
                sampler.settings = SamplingSettings(
                    drawing.scheduler, drawing.num_inference_steps, drawing.guidance_scale, 1
                )
                noise = starting_noise(1, shape, drawing.seed, PURPOSE, number)
                for step, latents in enumerate(
                    sampler.denoise(noise, [texts[drawing.prompt]], texts[drawing.negative_prompt]), 1
                ):
                    if cancelled():
                        return False
                    picture = to_pictures(
                        sampler._decoder(Tensor(sampler._vae_spec.unscaled(latents.asnumpy()))).asnumpy()
                    )[0]
                    send(Step(asked.job, number, side, step, drawing.num_inference_steps, picture))
                send(Picture(asked.job, number, side, picture))
        return True

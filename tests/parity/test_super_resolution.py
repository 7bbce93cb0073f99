"""What a second stage reads of small pictures is what diffusers' pipeline makes of them, with the same noise."""

import diffusers
import numpy as np
import pytest
import torch

from dreambooth_ms.data import second_stage
from dreambooth_ms.diffusion import NoiseSchedule, low_resolution
from dreambooth_ms.errors import ConfigError, WeightError
from dreambooth_ms.formats.folder_layout import NOISING, write_json
from dreambooth_ms.formats.model_config import read_scheduler_config
from dreambooth_ms.randomness import standard_normal
from dreambooth_ms.weights.bundle import open_bundle
from tests.parity.reference import normal, relative_error
from tests.tiny_model import IF_SCHEDULER, write_random_if

SCHEDULE = NoiseSchedule.from_spec(read_scheduler_config(IF_SCHEDULER))


@pytest.mark.parametrize("size", [(12, 20), (7, 10), (1, 1), (6, 5)])
def test_small_pictures_are_enlarged_and_noisy_as_diffusers_reads_them(size):
    small, noise, levels = normal(3, 3, 6, 5), normal(3, 3, *size, seed=1), np.array([0, 250, 999])
    enlarged = torch.nn.functional.interpolate(torch.tensor(small), size, mode="bilinear", align_corners=True)
    reference = diffusers.DDPMScheduler.from_config(IF_SCHEDULER)
    expected = reference.add_noise(enlarged, torch.tensor(noise), torch.tensor(levels))
    ours = low_resolution(SCHEDULE, levels, small, noise)
    assert ours.dtype == np.float32
    for row in range(3):
        assert relative_error(ours[row], expected[row]) < 1e-5
    # Between the centres of pixels, as pictures are enlarged otherwise, they would be others.
    other = torch.nn.functional.interpolate(torch.tensor(small), (12, 20), mode="bilinear")
    assert size != (12, 20) or relative_error(enlarged, other) > 0.05


def test_the_noise_of_a_small_picture_is_its_own():
    small = normal(3, 3, 6, 5)
    ours, labels = second_stage.of_request(small, (12, 20), 250, SCHEDULE, 5, [4, 2, 3])
    assert labels.tolist() == [250, 250, 250]
    alone, _ = second_stage.of_request(small[1:2], (12, 20), 250, SCHEDULE, 5, [2])
    assert np.array_equal(alone[0], ours[1])
    noise = standard_normal((3, 12, 20), 5, second_stage.PURPOSE, row=2)
    assert np.array_equal(low_resolution(SCHEDULE, np.array([250]), small[1:2], noise[None]), alone)
    seeded, _ = second_stage.of_request(small[1:2], (12, 20), 250, SCHEDULE, 6, [2])
    assert relative_error(seeded, alone) > 0.1
    for level in (-1, 1000):
        with pytest.raises(ConfigError, match=rf"--noise_level {level}: expected 0 to 999"):
            second_stage.of_request(small, (12, 20), level, SCHEDULE, 5, [0, 1, 2])


def test_a_second_stage_says_how_small_pictures_are_noisy(tmp_path):
    folder = write_random_if(tmp_path, second=True)
    assert np.array_equal(open_bundle(folder).noise_of_small.alphas_cumprod, SCHEDULE.alphas_cumprod)
    write_json(folder / NOISING, {"_class_name": "EDMEulerScheduler"})
    with pytest.raises(WeightError, match=r"image_noising_scheduler.*: is of EDM's formulation"):
        _ = open_bundle(folder).noise_of_small
    (folder / NOISING).unlink()
    with pytest.raises(WeightError, match=r"image_noising_scheduler: scheduler_config.json is missing"):
        _ = open_bundle(folder).noise_of_small

"""How parameters are shared out among processes."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreambooth_ms.config.load import load
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.errors import ConfigError
from dreambooth_ms.training.optimisers import part_bounds


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 9))
def test_every_parameter_is_in_one_part_and_in_order(sizes, count):
    bounds = part_bounds(sizes, count)
    assert (len(bounds), bounds[0], bounds[-1]) == (count + 1, 0, len(sizes))
    assert bounds == sorted(bounds)


@given(st.lists(st.integers(1, 1000), min_size=9, max_size=60), st.integers(1, 9))
def test_no_part_is_larger_than_its_share_by_more_than_one_parameter(sizes, count):
    bounds = part_bounds(sizes, count)
    parts = [sum(sizes[start:stop]) for start, stop in pairwise(bounds)]
    assert max(parts) <= np.ceil(sum(sizes) / count) + max(sizes)


@pytest.mark.parametrize("flag", ["--use_8bit_adam", "--optimizer=adafactor", "--optimizer=prodigy"])
def test_only_the_moments_of_adamw_are_shared_out(flag):
    needed = ["--pretrained_model_name_or_path", "m", "--instance_data_dir", "d", "--instance_prompt", "p"]
    with pytest.raises(ConfigError, match="--zero_stage 1: shares out the moments of plain AdamW"):
        load(TrainConfig, [*needed, "--zero_stage", "1", *flag.split("=")])

"""Equal cells without parameters are one, which halves what MindSpore has to compile."""

from mindspore import nn

from dreambooth_ms.models.unet import UNet2DConditionModel
from dreambooth_ms.ops import GatedGelu, MultiHeadAttention, shared
from dreambooth_ms.runtime.device import Formulation
from tests.tiny_model import UNET
from tools.formulation import use_formulation


def test_equal_arguments_give_the_same_cell_and_others_another():
    assert shared(nn.ReLU) is shared(nn.ReLU)
    assert shared(nn.Flatten, 1) is not shared(nn.Flatten, 2)


def test_formulations_share_nothing():
    here = shared(MultiHeadAttention, 2, 8)
    with use_formulation(Formulation.ASCEND):
        there = shared(MultiHeadAttention, 2, 8)
    assert (here.fuses, there.fuses) == (False, True)


def test_a_network_holds_every_cell_without_parameters_once():
    counted = [type(cell).__name__ for _, cell in UNet2DConditionModel(UNET).cells_and_names()]
    assert counted.count("GatedGelu") == 1
    assert isinstance(shared(GatedGelu), GatedGelu)


def test_two_networks_share_no_cell_with_parameters():
    first, second = (dict(UNet2DConditionModel(UNET).cells_and_names()) for _ in range(2))
    in_common = [first[name] for name in first if first[name] is second[name]]
    assert in_common
    assert not any(list(cell.get_parameters()) for cell in in_common)

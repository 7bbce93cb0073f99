"""mindone's naming against the lists of names that its own wheel carries."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from dreambooth_ms.formats.naming.formats import Format, naming_of
from dreambooth_ms.formats.naming.recognise import recognise_model
from tests.small_specs import PUBLISHED
from tests.stored_tensors import written_shapes

LISTS = Path(next(iter(find_spec("mindone").submodule_search_locations))) / "tools" / "sd_torch_to_mindspore"


def listed(name):
    """The names and shapes of a list: one per line, `name#(2, 3)#dtype`."""
    lines = []
    for line in (LISTS / name).read_text().splitlines():
        stored, shape, _ = line.split("#")
        lines.append((stored, tuple(map(int, re.findall(r"\d+", shape)))))
    return lines


@pytest.mark.parametrize(("family", "version", "count"), [("sd15", 1, 1082), ("sd21", 2, 1214)])
class TestSdLists:
    def test_every_name_of_the_list_maps_and_comes_back_and_nothing_is_left_over(self, family, version, count):
        stored = dict(listed(f"mindspore_v{version}.txt"))
        naming = naming_of(Format.MINDONE, PUBLISHED[family])
        read = naming.read_plan(stored)
        assert read.report.fits
        assert not read.ignored
        written = naming.write_plan(list(read.slots))
        shapes = written_shapes(written, naming.shapes)
        assert shapes == stored
        assert len(stored) == count

    def test_the_list_is_recognised(self, family, version, count):
        recognition = recognise_model(dict(listed(f"mindspore_v{version}.txt")), "a list")
        assert recognition.form is Format.MINDONE
        assert recognition.model == PUBLISHED[family]

    def test_the_list_for_torch_is_stabilitys_naming(self, family, version, count):
        stored = dict(listed(f"torch_v{version}.txt"))
        recognition = recognise_model(stored, "a list")
        assert (recognition.form, recognition.model) == (Format.STABILITY, PUBLISHED[family])
        read = recognition.naming.read_plan(stored)
        assert read.report.fits
        assert not read.ignored


@pytest.mark.parametrize(("family", "version"), [("sd15", 1), ("sd21", 2)])
def test_both_lists_name_the_same_parameter_in_the_same_line(family, version):
    """The wheel pairs its lists by position. Outside the fused text towers of SD 1 that holds line by line."""
    here, there = listed(f"mindspore_v{version}.txt"), listed(f"torch_v{version}.txt")
    if version == 1:
        here, there = (
            [line for line in lines if not line[0].startswith("cond_stage_model.")] for lines in (here, there)
        )
    model = PUBLISHED[family]
    mindone, stability = naming_of(Format.MINDONE, model), naming_of(Format.STABILITY, model)
    pairs = {
        (mindone.slots[name].name, stability.slots[name].name, mindone.slots[name].block == stability.slots[name].block)
        for name in mindone.slots
    }
    assert len(here) == len(there)
    for (ours, _), (theirs, _) in zip(here, there, strict=True):
        assert (ours, theirs, True) in pairs


def test_sdxl_has_the_2514_parameters_of_the_example():
    naming = naming_of(Format.MINDONE, PUBLISHED["sdxl"])
    whole = naming.write_plan(list(naming.shapes))
    assert len(whole.tensors) == 2514
    from_diffusers = naming.write_plan(naming.required())
    assert len(from_diffusers.tensors) + len(from_diffusers.constants) == 2514

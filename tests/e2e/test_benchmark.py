"""The shortened benchmark of the embedded base, as its file has it."""

import json
import math

from dreambooth_ms.cli.main import main
from tools.tiny_base.subject_set import write_set


def test_the_short_benchmark_trains_measures_and_goes_on(tmp_path, capfd):
    subjects, output = write_set(tmp_path / "subjects"), tmp_path / "out"
    flags = ["--subjects_dir", str(subjects), "--held_out_data_dir", str(subjects / "held_out")]
    command = ["benchmark", "configs/benchmark/tiny_shapes_short.yaml", *flags, "--output_dir", str(output)]
    assert main(command) == 0
    printed = capfd.readouterr().out
    runs = {name: output / "bonfire" / f"{name}-0" for name in ("lora", "full")}
    found = {name: json.loads((folder / "figures.json").read_text())["measures"] for name, folder in runs.items()}
    for measures in found.values():
        assert list(measures)[:3] == ["CLIP-I", "CLIP-I, held out", "CLIP-T"]
        assert all(math.isfinite(one["adapted"]["mean"]) for one in measures.values())
        # Both have learnt something, and both began at the same base.
        assert measures["class drift, CLIP"]["adapted"]["mean"] > 1e-4
        assert abs(measures["CLIP-T"]["base"]["mean"] - found["lora"]["CLIP-T"]["base"]["mean"]) < 1e-5
    assert [line.split(" | ")[0] for line in printed.splitlines()[2:6]] == [
        "| none",
        "| lora",
        "| full",
        "| photographs",
    ]
    assert printed == (output / "table.md").read_text()

    # Only what is not done is done: the full model is evaluated, and it was trained already.
    before = (runs["lora"] / "figures.json").stat().st_mtime_ns
    (runs["full"] / "figures.json").unlink()
    assert main(command) == 0
    again = capfd.readouterr()
    assert "nothing left to do" in again.err and "run 1 of 2" not in again.err
    assert again.out == printed
    assert (runs["lora"] / "figures.json").stat().st_mtime_ns == before

"""What users may write on the command line and in files, and what the message says when it is wrong."""

import ast
import contextlib
import inspect
import re
from dataclasses import MISSING

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dreambooth_ms.config import commands, sample, shared
from dreambooth_ms.config import train as train_schema
from dreambooth_ms.config.commands import ConvertConfig, EvaluateConfig, ExtractConfig, InspectConfig, MergeConfig
from dreambooth_ms.config.concepts import ConceptConfig
from dreambooth_ms.config.load import canonical, load, to_yaml
from dreambooth_ms.config.sample import SD_XL_BASE_RATIOS, SampleConfig
from dreambooth_ms.config.schema import describe, field_documentation, schema_fields, sections
from dreambooth_ms.config.spellings import BASE_THEN_ADAPTERS, CONVERTED, HARMLESS, REFUSED, SPELLINGS, VALUES
from dreambooth_ms.config.train import TrainConfig
from dreambooth_ms.errors import ConfigError
from tests.published_flags import BY_METHOD, FULL_SCRIPT, LORA_SCRIPT, SDXL_SCRIPT

REQUIRED = ["--pretrained_model_name_or_path", "base", "--instance_data_dir", "dog", "--instance_prompt", "a sks dog"]
BASE_OUTPUT = ["--prior_preservation", "base_output"]
INVERSION = ["--method", "textual_inversion", "--modifier_token", "<new1>"]
PRIOR = ["--with_prior_preservation", "--class_data_dir", "dogs", "--class_prompt", "a dog"]
SAMPLE_REQUIRED = ["--pretrained_model_name_or_path", "base", "--prompt", "a sks dog"]
EVERY_SCHEMA = pytest.mark.parametrize(
    "schema", [TrainConfig, SampleConfig, EvaluateConfig, ConvertConfig, InspectConfig, MergeConfig]
)


def train(*flags: str) -> TrainConfig:
    return load(TrainConfig, [*REQUIRED, *flags])


def notes(schema: type, flags: list[str]) -> tuple[str, ...]:
    notes: list[str] = []
    load(schema, flags, notes.append)
    return tuple(notes)


def problems(*flags: str, schema: type = TrainConfig) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(schema, list(flags))
    return str(caught.value).splitlines()


def train_problems(*flags: str) -> list[str]:
    return problems(*REQUIRED, *flags)


def write(path, text: str) -> list[str]:
    path.write_text(text, encoding="utf-8")
    return ["--config", str(path)]


# --- The schema ---


@EVERY_SCHEMA
def test_every_field_is_documented(schema):
    for owner in sections(schema).values():
        assert field_documentation(owner).keys() == owner.__dataclass_fields__.keys()


@EVERY_SCHEMA
def test_every_rule_is_about_fields_of_its_schema(schema):
    known = schema_fields(schema)
    values = {name: None if one.optional or one.default is MISSING else one.default for name, one in known.items()}
    values |= {name: "x" for name in ("class_data_dir", "instance_data_dir") if name in known}
    for one in known.values():
        for rule in one.rules:
            rule.broken(values)
            message = rule.message.format_map(values | {"field": one.name})
            assert known.keys() >= set(re.findall(r"--(\w+)", message))
            assert rule.is_note or f"--{one.name}" in message


@EVERY_SCHEMA
def test_every_number_has_a_range(schema):
    assert all(one.range for one in schema_fields(schema).values() if one.kind in (int, float))


@pytest.mark.parametrize(("name", "default"), SDXL_SCRIPT.items())
def test_a_command_for_the_sdxl_script_is_understood(name, default):
    """With the script's own defaults, of which some are not ours: those are values like any others."""
    if default is MISSING:
        return
    flag = f"--{name}={default}"
    config = train(*(["--train_text_encoder"] if "text_encoder" in name else []), flag)
    field = schema_fields(TrainConfig).get(name)
    if field is not None:
        assert getattr(getattr(config, field.section), name) == default
    else:
        assert name in HARMLESS or name in REFUSED or name in CONVERTED


EVERY_PUBLISHED_FLAG = pytest.mark.parametrize(
    ("method", "name", "default"),
    [
        (method, name, default)
        for method, script in (("full", FULL_SCRIPT), ("lora", LORA_SCRIPT))
        for name, default in script.items()
    ],
)


def test_the_published_scripts_are_listed_whole():
    assert (len(FULL_SCRIPT), len(LORA_SCRIPT)) == (61, 59)
    assert len(SDXL_SCRIPT) == 72


@EVERY_PUBLISHED_FLAG
def test_a_flag_of_the_published_script_has_its_default_or_says_what_becomes_of_it(method, name, default):
    field = schema_fields(TrainConfig).get(name)
    if name in BY_METHOD:
        assert field.default is None
        assert str(getattr(train("--method", method), name)) == str(default)
    elif name in ("instance_data_dir", "instance_prompt"):
        assert field.default is None  # Required without --concepts_list.
    elif name == "validation_epochs":
        assert field.default is None  # For validation_steps, which only the script for full training has.
    elif field is not None:
        assert (field.default, type(field.default)) == (default, type(default))
    elif name in HARMLESS:
        assert notes(TrainConfig, [*REQUIRED, f"--{name}"]) == (f"--{name} is accepted and ignored: {HARMLESS[name]}",)
    else:
        assert train_problems(f"--{name}", "something") == [f"--{name}: {REFUSED[name].reason}"]


@EVERY_PUBLISHED_FLAG
def test_a_command_that_spells_out_the_published_default_changes_nothing(method, name, default):
    flags = ["--method", method, f"--{name}={default}"]
    if default is not MISSING:
        spelt_out, plain = train(*flags), train("--method", method)
        assert (spelt_out.learning_rate, spelt_out.output_dir) == (plain.learning_rate, plain.output_dir)
        if name not in (*BY_METHOD, "validation_epochs"):
            assert spelt_out == plain


def test_defaults_that_hang_on_the_method_give_way_to_what_is_given():
    config = train("--method", "full", "--learning_rate", "1e-5", "--output_dir", "dog")
    assert (config.learning_rate, str(config.output_dir)) == (1e-5, "dog")


def test_offset_noise_is_a_noise_offset_of_the_published_strength():
    given = ([], ["--offset_noise"], ["--noise_offset", "0.05"])
    assert [train(*flags).loss.offset_strength for flags in given] == [0.0, 0.1, 0.05]


def test_every_class_of_the_schema_is_frozen():
    config = train()
    with pytest.raises(AttributeError):
        config.method.rank = 8
    with pytest.raises(AttributeError):
        config.method = None


def test_two_loads_share_no_list():
    train().method.lora_target_modules.append("conv")
    assert train().method.lora_target_modules == ["to_k", "to_q", "to_v", "to_out.0"]


# --- Flags ---


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        (["--center_crop"], True),
        (["--center_crop", "True"], True),
        (["--center_crop", "true"], True),
        (["--center_crop=True"], True),
        (["--center-crop"], True),
        (["--center_crop", "False"], False),
        (["--center_crop=False"], False),
        (["--no-center_crop"], False),
        (["--no_center_crop"], False),
        (["--no-center-crop"], False),
        (["--center_crop", "--no-center_crop"], False),
        (["--no-center_crop", "--center_crop"], True),
    ],
)
def test_a_switch_is_written_in_any_usual_way(flags, value):
    assert train(*flags).data.center_crop is value


@pytest.mark.parametrize("flags", [["--rank", "8"], ["--rank=8"], ["--rank", "2", "--rank", "8"]])
def test_a_value_follows_its_flag_and_the_last_one_counts(flags):
    assert train(*flags).method.rank == 8


@pytest.mark.parametrize("flags", [["to_q", "to_v"], ["to_q,to_v"], ["to_q,", "to_v"]])
def test_a_list_is_written_with_spaces_or_commas(flags):
    assert train("--lora_target_modules", *flags).method.lora_target_modules == ["to_q", "to_v"]


def test_a_list_grows_when_its_flag_is_repeated():
    config = load(SampleConfig, [*SAMPLE_REQUIRED, "--lora", "a", "--lora=b,c"])
    assert config.weights.lora == ["a", "b", "c"]


@pytest.mark.parametrize("word", ["None", "null"])
def test_none_can_be_said_where_it_means_something(word):
    assert train("--seed", word).run.seed is None
    assert train_problems("--rank", word) == [f"--rank: expected a whole number, got '{word}'"]


def test_none_can_be_said_in_a_file_as_in_a_flag(tmp_path):
    config = train(*write(tmp_path / "run.yaml", "seed: None\nclass_prompt: None\nmax_train_steps: null"))
    assert (config.run.seed, config.prior.class_prompt, config.run.max_train_steps) == (None, None, None)


def test_a_negative_number_is_a_value():
    assert load(SampleConfig, [*SAMPLE_REQUIRED, "--lora", "a", "--lora_scale", "-0.5"]).weights.lora_scale == [-0.5]


def test_choices_are_found_in_any_case():
    assert train("--device_target", "cpu").device.device_target == "CPU"


def test_interpolation_is_plain_text_in_a_flag():
    assert train("--instance_prompt", "a ${oc.env:HOME} dog").data.instance_prompt == "a ${oc.env:HOME} dog"


@pytest.mark.parametrize("name", ["use_ema", "rank", "learning_rate", "lr_scheduler", "prior_loss_weight"])
def test_interpolation_in_a_flag_is_no_number_switch_or_choice(name):
    field = schema_fields(TrainConfig)[name]
    assert train_problems(f"--{name}", "${x}") == [f"--{name}: expected {field.expected}, got '${{x}}'"]


@given((st.text() | st.text("\\${}?\"' :a\n")).filter(lambda text: text != "???" and "\0" not in text))
@example("${")
@example("\\${oc.env:HOME}")
@example("\\\\${x} \\")
@settings(max_examples=50, deadline=None)
def test_any_prompt_survives_the_command_line_and_a_resolved_file(tmp_path_factory, prompt):
    config = load(SampleConfig, [*SAMPLE_REQUIRED, f"--negative_prompt={prompt}"])
    assert config.pictures.negative_prompt == prompt
    resolved = write(tmp_path_factory.mktemp("resolved") / "config.yaml", to_yaml(config))
    assert load(SampleConfig, resolved) == config


@given(
    rank=st.integers(1, 10**6),
    rate=st.floats(1e-300, 1e300),
    seed=st.none() | st.integers(0, 2**64 - 1),
    flip=st.booleans(),
    schedule=st.sampled_from(schema_fields(TrainConfig)["lr_scheduler"].kind),
    modules=st.lists(st.text("abc._0123456789", min_size=1), min_size=1),
)
@settings(max_examples=25, deadline=None)
def test_any_resolved_configuration_loads_again(tmp_path_factory, rank, rate, seed, flip, schedule, modules):
    schedule = "constant" if rate <= train_schema.POLYNOMIAL_END_RATE else schedule
    flags = [f"--rank={rank}", f"--learning_rate={rate!r}", f"--seed={seed}", f"--random_flip={flip}"]
    config = train(*flags, "--lr_scheduler", schedule, "--lora_target_modules", *modules)
    assert (config.method.rank, config.optimiser.learning_rate, config.run.seed) == (rank, rate, seed)
    assert (config.data.random_flip, config.method.lora_target_modules) == (flip, modules)
    resolved = write(tmp_path_factory.mktemp("resolved") / "config.yaml", to_yaml(config))
    assert load(TrainConfig, resolved) == config


def values_of(one):
    """Valid values of a field."""
    number = {
        int: st.integers(0, 40) | st.integers(0, 2**64 - 1),
        float: st.floats(0, 2) | st.floats(min_value=0, allow_nan=False, allow_infinity=False),
        str: st.text("aé$\\{}: #'\"-~/\n", max_size=8) | st.sampled_from(["yes", "no", "1", "1e3", "=", "0x1F", "~"]),
        bool: st.booleans(),
        list[str]: st.lists(st.text("ab_.0", min_size=1, max_size=4), min_size=1, max_size=3),
        list[float]: st.lists(st.floats(-2, 2), min_size=1, max_size=3),
        tuple[str, ...]: st.lists(st.text("aé,${}: '-~", min_size=1, max_size=8), min_size=1, max_size=3).map(tuple),
    }
    kinds = st.sampled_from(one.kind) if isinstance(one.kind, tuple) else number[one.kind]
    valid = kinds.filter(lambda value: one.range is None or one.range.holds(value))
    if one.is_path:
        valid = valid.filter(lambda value: not str(value).startswith("~"))
    if one.name == "prompt_template":
        valid = number[str].map("{}{{CAPTION}}".format)
    if one.name in ("rank_pattern", "alpha_pattern"):
        valid = st.sampled_from(['{"to_q": 8}', '{"attn2.to_k": 0.5, "to_v": 0}', "4,8,2", "[1, 2.5]"])
    if one.name == "report_to":
        valid = st.sampled_from([["all"], ["none"], ["wandb"], ["tensorboard", "trackio", "swanlab"]])
    if one.name == "hub_model_id":
        valid = st.sampled_from(["dog", "my-group/dog_1.5"])
    if one.name == "sd_xl_base_ratios":
        valid = st.sampled_from(sorted(SD_XL_BASE_RATIOS))
    if one.name in ("resolution", "height", "width", "vae_whole_up_to"):
        valid = st.integers(4, 200).map(lambda eighths: 8 * eighths)
    return st.none() | valid if one.optional else valid


OF_SCHEMAS = ("--concepts: an adapter", "--concept_prompts: expected one", "--lora: missing", ": required",
              "--modifier_token: new words are", "--initializer_token", "--lora_scale: expected one number",
              "--extract_ratio")  # fmt: skip
"""What `missing` and `problems` of schemas say, beside the rules at fields."""


def may_break(schema):
    """What two values can break together: the texts of rules, with anything for what they are filled with."""
    rules = [(one.name, rule) for one in schema_fields(schema).values() for rule in one.rules if not rule.is_note]
    texts = [re.escape(rule.message.replace("{field}", name)) for name, rule in rules]
    return [re.sub(r"\\{\w+(?:!r)?\\}", ".*", text) for text in texts] + [re.escape(text) for text in OF_SCHEMAS]


def written_as_flag(name, value):
    if isinstance(value, tuple):
        return [f"--{name}={text}" for text in value]
    return [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]


@EVERY_SCHEMA
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_any_valid_values_survive_the_command_line_and_a_resolved_file(tmp_path_factory, schema, data):
    known = schema_fields(schema)
    required = [name for name, one in known.items() if one.default is MISSING]
    others = data.draw(st.lists(st.sampled_from(sorted(known.keys() - {*required})), max_size=8, unique=True))
    given_values = {name: data.draw(values_of(known[name]), name) for name in [*required, *others]}
    flags = [text for name, value in given_values.items() for text in written_as_flag(name, value)]
    try:
        config = load(schema, flags)
    except ConfigError as error:
        # Only what two values mean together can be wrong with them.
        assert all(any(re.search(rule, line) for rule in may_break(schema)) for line in str(error).splitlines()), error
        return
    held = config.values()
    assert {name: held[name] for name in given_values} == given_values
    resolved = write(tmp_path_factory.mktemp("resolved") / "config.yaml", to_yaml(config))
    # A secret stands in no file.
    kept = {name: None if known[name].is_secret else value for name, value in config.values().items()}
    assert load(schema, resolved).values() == kept


WORDS = st.text(max_size=6) | st.sampled_from(
    [
        "--",
        "-",
        "--=",
        "==",
        "True",
        "None",
        "???",
        "${",
        "1e400",
        "9" * 400,
        "-0",
        ".",
        "/",
        "\ud800",
        "\0",
        "a,b",
        "--no-",
    ]
)
FLAGS = st.sampled_from(
    [
        *schema_fields(TrainConfig),
        *SPELLINGS,
        *REFUSED,
        *HARMLESS,
        *CONVERTED,
        BASE_THEN_ADAPTERS,
        "config",
        "no_center_crop",
    ]
).map(lambda name: f"--{name}")


@given(st.lists(FLAGS | WORDS | st.tuples(FLAGS, WORDS).map("=".join), max_size=8))
@settings(max_examples=60, deadline=None)
def test_no_command_line_gives_anything_but_a_configuration_or_lines_about_it(argv):
    for words in (argv, [*REQUIRED, *argv]):
        try:
            load(TrainConfig, words)
        except ConfigError as error:
            assert all(line.strip() for line in str(error).split("\n--"))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates()
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*sections(TrainConfig), *schema_fields(TrainConfig)])
            | st.text(max_size=4)
            | st.integers(),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@given(
    TREES.map(lambda tree: yaml.safe_dump(tree).encode())
    | st.binary(max_size=30)
    | st.text(max_size=30).map(str.encode)
)
@settings(max_examples=60, deadline=None)
def test_no_file_gives_anything_but_a_configuration_or_lines_about_it(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "run.yaml"
    path.write_bytes(content)
    with contextlib.suppress(ConfigError):
        load(TrainConfig, [*REQUIRED, "--config", str(path)])


# --- Files ---


@pytest.mark.parametrize(
    "text", ["rank: 8\nlearning_rate: 1e-5\n", "method: {rank: 8}\noptimiser:\n  learning_rate: 1e-5"]
)
def test_a_file_is_flat_or_by_section(tmp_path, text):
    config = train(*write(tmp_path / "run.yaml", text))
    assert (config.method.rank, config.optimiser.learning_rate) == (8, 1e-5)


def test_the_section_and_the_field_called_method_are_told_apart(tmp_path):
    assert train(*write(tmp_path / "run.yaml", "method: lora")).method.method == "lora"
    assert train(*write(tmp_path / "run.yaml", "method: {method: lora, rank: 2}")).method.rank == 2


def test_flags_win_over_files_wherever_they_stand_and_later_files_over_earlier(tmp_path):
    first = write(tmp_path / "first.yaml", "rank: 8\nresolution: 256\nseed: 3")
    second = write(tmp_path / "second.yaml", "resolution: 128\nseed: 4")
    config = train("--seed", "5", *first, *second)
    assert (config.method.rank, config.data.resolution, config.run.seed) == (8, 128, 5)


def test_a_flag_replaces_the_list_of_a_file(tmp_path):
    file = write(tmp_path / "run.yaml", "lora_target_modules: [to_k, to_q]")
    assert train(*file).method.lora_target_modules == ["to_k", "to_q"]
    assert train(*file, "--lora_target_modules", "to_v").method.lora_target_modules == ["to_v"]


def test_a_file_may_give_what_is_required_and_use_other_spellings(tmp_path):
    text = "pretrained_model_name_or_path: base\ninstance_data_path: dog\ninstance_prompt: a dog\nrun: {save_path: out}"
    config = load(TrainConfig, write(tmp_path / "run.yaml", text))
    assert (config.data.instance_data_dir, config.run.output_dir) == ("dog", "out")


def test_a_file_may_refer_to_itself_and_to_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("DOG", "rex")
    text = "seed: 7\nrank: ${seed}\nclass_prompt: ${oc.env:DOG}"
    config = train(*write(tmp_path / "run.yaml", text))
    assert (config.method.rank, config.prior.class_prompt) == (7, "rex")


def test_an_empty_section_or_file_changes_nothing(tmp_path):
    assert train(*write(tmp_path / "run.yaml", "prior:\n")) == train(*write(tmp_path / "none.yaml", "")) == train()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("instanc_prompt: x", "{file}: instanc_prompt: unknown key; did you mean instance_prompt?"),
        ("data: {resolutoin: 64}", "{file}: data.resolutoin: unknown key; did you mean resolution?"),
        ("optimizer: {learning_rate: 1}", "{file}: optimizer: unknown section; did you mean optimiser?"),
        ("data: {rank: 8}", "{file}: data.rank: belongs to section method"),
        ("rank: 8.5", "{file}: rank: expected a whole number, got 8.5"),
        ("rank: true", "{file}: rank: expected a whole number, got True"),
        ("rank: [1, 2]", "{file}: rank: expected a whole number, got [1, 2]"),
        ("rank: {a: 1}", "{file}: rank: expected a whole number, got {{'a': 1}}"),
        ("rank:", "{file}: rank: expected a whole number, got None"),
        ("center_crop: 3", "{file}: center_crop: expected True or False, got 3"),
        ("learning_rate: fast", "{file}: learning_rate: expected a number, or None, got 'fast'"),
        ("lora_target_modules: {a: 1}", "{file}: lora_target_modules: expected a list of texts, got {{'a': 1}}"),
        ("revision: 0123", "{file}: revision: expected text, got 83; put it in quotes"),
        ("class_prompt: ???", "{file}: class_prompt: ??? stands for a value that is still to be given"),
        ("sample_at_first: true", f"{{file}}: sample_at_first: {REFUSED['sample_at_first'].reason}"),
        ("rank: 1\nrank: 2", "--config {file}: line 2: found duplicate key rank"),
        ("- rank", "--config {file}: expected lines such as `rank: 4`"),
        ("seed: ${nowhere}", "--config {file}: Interpolation key 'nowhere' not found"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_the_file(tmp_path, text, message):
    flags = write(tmp_path / "run.yaml", text)
    assert train_problems(*flags) == [message.format(file=flags[1])]


def test_a_mistake_in_the_syntax_of_a_file_is_named_with_its_line(tmp_path):
    flags = write(tmp_path / "run.yaml", "seed: 1\nrank: 4: 5")
    (line,) = train_problems(*flags)
    assert line.startswith(f"--config {flags[1]}: line 2: mapping values are not allowed")


def test_a_missing_file_is_the_one_thing_reported_about_what_it_may_hold(tmp_path):
    file = str(tmp_path / "nothing.yaml")
    assert problems("--config", file, "--with_prior_preservation", "--rank", "0") == [
        f"--config {file}: No such file or directory",
        "--rank: expected at least 1, got 0",
    ]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"rank: \x00"])
def test_a_file_that_is_not_text_is_refused(tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    (line,) = train_problems("--config", str(path))
    assert line.startswith(f"--config {path}: ")


# --- Other people's names ---


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_stands_for_a_field_and_is_not_one(name):
    targets = SPELLINGS[name]
    known = [schema_fields(ConceptConfig), schema_fields(SampleConfig)]
    weights = [schema_fields(one) for one in (ConvertConfig, ExtractConfig, MergeConfig)]
    assert all(any(target in fields for fields in known + weights) for target in targets)
    assert all(name not in fields for fields in known)
    assert all(len(set(targets) & fields.keys()) <= 1 for fields in known), "a spelling must mean one thing"


def test_no_name_is_in_two_tables():
    train_fields, sample_fields = schema_fields(TrainConfig).keys(), schema_fields(SampleConfig).keys()
    # Some are names of fields that are also given in another way, or give another field too.
    converted = CONVERTED.keys() - {"optimizer", "reg_data_dir", "resolution"}
    # What is another name of what one command has, another command may refuse.
    refused = [name for name in REFUSED if not set(SPELLINGS.get(name, ())) & (train_fields ^ sample_fields)]
    others = [*SPELLINGS, *refused, *HARMLESS, *converted, BASE_THEN_ADAPTERS, "config"]
    assert len(others) == len(set(others))
    # What one command has, another may refuse.
    assert not (train_fields & sample_fields & set(others))
    assert not ((train_fields | sample_fields) & {*SPELLINGS, *HARMLESS, BASE_THEN_ADAPTERS, "config"})


@pytest.mark.parametrize(
    ("flag", "section", "field"),
    [
        ("save_ckpt_interval", "run", "checkpointing_steps"),
        ("max_num_ckpt", "run", "checkpoints_total_limit"),
        ("lora_rank", "method", "rank"),
        ("per_batch_size", "run", "train_batch_size"),
        ("sampling_steps", "prior", "infer_steps"),
    ],
)
def test_another_spelling_sets_the_field(flag, section, field):
    assert getattr(getattr(train(f"--{flag}", "7"), section), field) == 7


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ([], None),
        (["--ms_amp_level", "O0"], "no"),
        (["--ms_amp_level", "O1"], "fp16"),
        (["--ms_amp_level", "o2"], "fp16"),
        (["--ms_amp_level=O3"], "fp16"),
        (["--ms_amp_level", "auto"], "auto"),
        (["--mixed_precision", "fp32"], "no"),
        (["--mixed_precision", "no"], "no"),
        (["--mixed_precision", "FP16"], "fp16"),
        (["--mixed_precision", "bf16"], "bf16"),
    ],
)
def test_levels_of_mixed_precision_are_understood_in_training_and_sampling(flags, precision):
    assert train(*flags).device.mixed_precision == precision
    assert load(SampleConfig, [*SAMPLE_REQUIRED, *flags]).device.mixed_precision == precision


def test_a_bare_no_in_a_file_is_no_mixed_precision(tmp_path):
    """YAML reads it as false."""
    config = train(*write(tmp_path / "run.yaml", "mixed_precision: no"))
    assert config.device.mixed_precision == "no"
    assert load(TrainConfig, write(tmp_path / "again.yaml", to_yaml(config))) == config


def test_an_unknown_level_of_mixed_precision_is_refused():
    assert train_problems("--ms_amp_level", "O4") == [
        "--ms_amp_level: expected one of no, fp16, bf16, auto, or None, got 'O4'"
    ]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_learning_rate_of_prodigy_is_1_unless_given(method):
    assert train("--method", method, "--optimizer", "Prodigy").learning_rate == 1
    assert train("--method", method, "--optimizer", "prodigy", "--learning_rate", "0.5").learning_rate == 0.5


def test_a_spelling_means_what_the_command_has():
    assert load(SampleConfig, [*SAMPLE_REQUIRED, "--sampling_steps", "7"]).pictures.num_inference_steps == 7
    assert problems(*SAMPLE_REQUIRED, "--lora_rank", "4", schema=SampleConfig)[0].startswith(
        "--lora_rank: unknown flag"
    )


def test_a_value_and_a_mistake_keep_the_name_the_user_gave():
    assert train_problems("--lora_rank", "x") == ["--lora_rank: expected a whole number, got 'x'"]


def test_two_spellings_of_one_flag_are_refused():
    assert train_problems("--rank", "4", "--lora_rank", "8") == [
        "--lora_rank: means the same as --rank; give one of them"
    ]


def test_weight_is_the_base_and_then_adapters():
    config = load(SampleConfig, ["--weight", "base,one,two", "--prompt", "x"])
    assert (config.weights.pretrained_model_name_or_path, config.weights.lora) == ("base", ["one", "two"])
    assert load(SampleConfig, ["--weight", "base", "--prompt", "x"]).weights.lora == []


def test_weight_in_training_is_the_base_alone():
    rest = REQUIRED[2:]
    assert load(TrainConfig, ["--weight", "base", *rest]).model.pretrained_model_name_or_path == "base"
    assert problems("--weight", "base,one", *rest) == ["--weight: expected one base model, got also one"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_flag_says_why_unless_it_asks_for_nothing(name):
    if canonical(name, schema_fields(TrainConfig)):  # Which `sample` refuses.
        assert f"--{name}: {REFUSED[name].reason}" in problems(*SAMPLE_REQUIRED, f"--{name}", schema=SampleConfig)
        return
    assert train_problems(f"--{name}") == [f"--{name}: {REFUSED[name].reason}"]
    for nothing in ("False", "None", "no", *REFUSED[name].unless):
        assert train(f"--{name}", nothing) == train()


@pytest.mark.parametrize("name", HARMLESS)
def test_a_harmless_flag_is_ignored_with_one_note(name):
    flags = [*REQUIRED, f"--{name}"]
    assert load(TrainConfig, flags) == train()
    assert notes(TrainConfig, flags) == (f"--{name} is accepted and ignored: {HARMLESS[name]}",)
    assert notes(TrainConfig, [*REQUIRED, f"--{name}", "False"]) == ()


@pytest.mark.parametrize("level", ["O2", "o2"])
def test_a_deprecated_jit_level_is_refused_with_its_reason(level):
    (problem,) = train_problems("--jit_level", level)
    assert problem.startswith(f"--jit_level: {level}: ") and "deprecated since 2.9; use O0 or O1" in problem
    assert train_problems("--jit_level", "O3") == ["--jit_level: expected one of O0, O1, or None, got 'O3'"]


@pytest.mark.parametrize("name", VALUES["method"])
def test_a_method_of_a_later_version_is_refused_by_name(name):
    assert train_problems("--method", name) == [f"--method: {name}: {VALUES['method'][name]}"]


# --- Mistakes ---


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "four"], "--rank: expected a whole number, got 'four'"),
        (["--rank", "4.0"], "--rank: expected a whole number, got '4.0'"),
        (["--rank"], "--rank: expected a whole number, got nothing"),
        (["--rank", ""], "--rank: expected a whole number, got ''"),
        (["--learning_rate", "fast"], "--learning_rate: expected a number, or None, got 'fast'"),
        (["--lr_power", "high"], "--lr_power: expected a number, got 'high'"),
        (["--seed", "x"], "--seed: expected a whole number, or None, got 'x'"),
        (["--center_crop", "maybe"], "--center_crop: expected True or False, got 'maybe'"),
        (["--center_crop="], "--center_crop: expected True or False, got ''"),
        (["--no-center_crop", "True"], "--no_center_crop: expected no value, got 'True'"),
        (["--prediction_type", "x0"], "--prediction_type: expected one of epsilon, v_prediction, or None, got 'x0'"),
        (
            ["--class_prompt", "a", "dog"],
            "--class_prompt: unexpected 'dog' after its value; put text with spaces in quotes",
        ),
        (["--config"], "--config: expected a YAML file, got nothing"),
        (["--weight"], "--weight: expected a value, got nothing"),
        (["--rnak", "8"], "--rnak: unknown flag; did you mean --rank?"),
        (["--no-rank"], "--no_rank: unknown flag; did you mean --rank or --conv_rank or --rank_pattern?"),
        (["--qqqq", "8", "9"], "--qqqq: unknown flag"),
        (["--"], "--: unknown flag"),
        (["--rank=8", "9"], "--rank: unexpected '9' after its value; put text with spaces in quotes"),
    ],
)
def test_one_mistake_is_one_clear_line(flags, message):
    assert train_problems(*flags) == [message]


def test_a_value_without_a_flag_is_reported():
    assert problems("dog", *REQUIRED) == ["unexpected 'dog': a value follows its flag, as in --seed 1"]


def test_what_is_required_is_asked_for():
    assert problems() == [
        "--pretrained_model_name_or_path: required",
        "--instance_data_dir: required",
        "--instance_prompt: required",
    ]


def test_a_misspelled_required_flag_is_not_also_reported_as_missing():
    assert problems(*REQUIRED[:4], "--instanc_prompt", "x") == [
        "--instanc_prompt: unknown flag; did you mean --instance_prompt?"
    ]


def test_a_required_value_in_the_wrong_section_is_not_also_reported_as_missing(tmp_path):
    file = write(tmp_path / "run.yaml", "model: {instance_prompt: a dog}")
    assert problems(*REQUIRED[:4], *file) == [f"{file[1]}: model.instance_prompt: belongs to section data"]


def test_all_mistakes_are_reported_together(tmp_path):
    file = write(tmp_path / "run.yaml", "resolution: wide\nzzz: 1")
    assert problems(
        *file,
        "--rank",
        "0",
        "--method",
        "pivotal_tuning",
        "--sample_at_first",
        "--with_prior_preservation",
        "--class_data_dir",
        "dogs",
    ) == [
        f"{file[1]}: resolution: expected a whole number, got 'wide'",
        f"{file[1]}: zzz: unknown key",
        f"--method: pivotal_tuning: {VALUES['method']['pivotal_tuning']}",
        f"--sample_at_first: {REFUSED['sample_at_first'].reason}",
        "--pretrained_model_name_or_path: required",
        "--instance_data_dir: required",
        "--instance_prompt: required",
        "--rank: expected at least 1, got 0",
        "--with_prior_preservation: needs --class_prompt, the prompt of the class pictures",
    ]


def test_a_mistaken_value_is_not_also_reported_as_missing():
    assert train_problems("--with_prior_preservation", "--class_prompt", "x", "--class_data_dir") == [
        "--class_data_dir: expected text, or None, got nothing"
    ]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ([], (False, None)),
        (["--prior_preservation"], (True, None)),
        (["--prior_preservation", "True"], (True, None)),
        (["--prior_preservation", "False"], (False, None)),
        (["--prior_preservation", "class_images"], (True, None)),
        (["--prior_preservation", "base_l2"], (False, "base_l2")),
        (["--prior_preservation", "base_output"], (False, "base_output")),
    ],
)
def test_prior_preservation_has_three_forms_and_is_a_switch_elsewhere(tmp_path, written, expected):
    classes = ["--class_prompt", "a dog", *(["--class_data_dir", "dogs"] if expected[0] else [])]
    config = train(*written, *classes)
    assert (config.prior.with_prior_preservation, config.prior.prior_preservation) == expected
    assert train(*write(tmp_path / "run.yaml", to_yaml(config))) == config
    file = write(tmp_path / "with.yaml", "with_prior_preservation: true\nclass_data_dir: dogs\nclass_prompt: a dog")
    over = train(*file, *written).prior
    assert (over.with_prior_preservation, over.prior_preservation) == (expected if written else (True, None))


def test_two_forms_of_prior_preservation_are_refused(tmp_path):
    one = "--prior_preservation base_l2: --with_prior_preservation is class_images; give one of them"
    assert one in train_problems(*PRIOR, "--prior_preservation", "base_l2")
    assert train_problems(*write(tmp_path / "run.yaml", "prior_preservation: base_l2"), *PRIOR) == [one]


OUTSIDE = {
    "resolution": ["0", "24", "100", "-64"],
    "prior_loss_weight": ["-1", "nan", "inf"],
    "base_l2_weight": ["-1", "nan", "inf"],
    "num_class_images": ["0"],
    "sample_batch_size": ["0"],
    "infer_steps": ["0", "1001"],
    "guidance_scale": ["-1", "nan"],
    "rank": ["0", "-4"],
    "lora_alpha": ["0"],
    "learning_rate": ["0", "-1e-4", "nan", "inf"],
    "lr_warmup_steps": ["-1"],
    "lr_num_cycles": ["0"],
    "lr_power": ["0"],
    "adam_beta1": ["1", "-0.1"],
    "adam_beta2": ["1.0", "nan"],
    "adam_weight_decay": ["-1"],
    "adam_epsilon": ["0"],
    "max_grad_norm": ["0"],
    "train_batch_size": ["0"],
    "max_device_memory": ["", "16", "GB", "0GB", "-1GB", "16TB"],
    "max_train_steps": ["0"],
    "num_train_epochs": ["0"],
    "seed": ["-1", str(2**64)],
    "checkpointing_steps": ["0"],
    "checkpoints_total_limit": ["0"],
    "ms_mode": ["2"],
    "instance_prompt": [""],
    "class_data_dir": [""],
    "output_dir": [""],
    "resume_from_checkpoint": [""],
    "logging_dir": [""],
    "report_to": ["comet_ml", "wandb,comet_ml", "none,wandb", "true"],
    "tracker_project_name": [""],
    "tracker_run_name": [""],
    "lora_target_modules": [""],
    "lora_dropout": ["1", "-0.1", "nan"],
    "ema_decay": ["1", "-0.1"],
    "snr_gamma": ["0", "-5", "inf"],
    "noise_offset": ["-0.1", "nan"],
    "huber_c": ["0", "1.5", "nan"],
    "multires_noise_iterations": ["-1"],
    "multires_noise_discount": ["-0.1", "1.1"],
    "ip_noise_gamma": ["-0.1", "inf"],
    "min_timestep": ["-1"],
    "timestep_bias_multiplier": ["0", "-1"],
    "timestep_bias_portion": ["0", "1.5"],
    "text_encoder_lr": ["0", "inf"],
    "gradient_accumulation_steps": ["0"],
    "validation_prompt": [""],
    "num_validation_images": ["0"],
    "validation_steps": ["0"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in OUTSIDE.items() for value in values])
def test_a_value_out_of_range_is_refused(name, value):
    (line,) = train_problems(f"--{name}={value}")
    assert line.startswith(f"--{name}: expected {schema_fields(TrainConfig)[name].range.expected}, got ")


@pytest.mark.parametrize(("name", "value"), [("height", "100"), ("width", "0"), ("num_inference_steps", "0"),
                                             ("lora_scale", "nan"), ("batch_size", "0"), ("prompt", "")])  # fmt: skip
def test_a_value_out_of_range_is_refused_in_sampling_too(name, value):
    (line,) = problems(*SAMPLE_REQUIRED, f"--{name}={value}", schema=SampleConfig)
    assert line.startswith(f"--{name}: expected {schema_fields(SampleConfig)[name].range.expected}, got ")


@pytest.mark.parametrize(
    ("flags", "value"),
    [("--resolution=32", 32), ("--lr_warmup_steps=0", 0), ("--adam_beta1=0", 0.0), (f"--seed={2**64 - 1}", 2**64 - 1)],
)
def test_the_ends_of_a_range_are_inside(flags, value):
    name = flags[2:].split("=")[0]
    config = train(flags)
    assert getattr(getattr(config, schema_fields(TrainConfig)[name].section), name) == value


@pytest.mark.parametrize(
    ("flags", "start"),
    [
        (["--with_prior_preservation", "--class_prompt", "a dog"], "--with_prior_preservation: needs --class_data_dir"),
        (["--with_prior_preservation", "--class_data_dir", "dogs"], "--with_prior_preservation: needs --class_prompt"),
        ([*PRIOR, "--class_data_dir", "./dog/"], "--class_data_dir: expected another folder than --instance_data_dir"),
        (["--lr_scheduler", "polynomial", "--learning_rate", "1e-7"], "--learning_rate: the polynomial schedule ends"),
        (["--offset_noise", "--noise_offset", "0.2"], "--offset_noise: is --noise_offset 0.1; give one of them"),
        (["--do_edm_style_training", "--snr_gamma", "5"], "--snr_gamma: --do_edm_style_training weighs rows by"),
        (["--do_edm_style_training", "--debiased_estimation_loss"], "--debiased_estimation_loss: --do_edm_style"),
        (["--rescale_betas_zero_snr", "--prediction_type", "epsilon"], "--rescale_betas_zero_snr: no picture follows"),
        (["--timestep_range", "900", "100"], "--max_timestep 100: expected more than --min_timestep 900"),
        (["--edm_sampling", "lognormal", "--max_timestep", "9"], "--max_timestep: the levels of --edm_sampling"),
        (["--edm_sampling", "lognormal", "--timestep_bias_strategy", "later"], "--timestep_bias_strategy: the levels"),
        (["--prediction_type", "sample"], "--prediction_type: expected one of epsilon, v_prediction"),
        (BASE_OUTPUT, "--prior_preservation base_output: needs --class_prompt, the prompt that the base answers"),
        (
            [*BASE_OUTPUT, "--class_prompt", "a dog", "--method", "full"],
            "--prior_preservation base_output: --method full has no update that could be left out; give base_l2",
        ),
        (
            ["--prior_preservation", "base_l2", *INVERSION],
            "--prior_preservation: --method textual_inversion changes no weight of the base; leave it out",
        ),
    ],
)
def test_an_impossible_combination_is_refused(flags, start):
    (line,) = train_problems(*flags)
    assert line.startswith(start)


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        (
            ["--class_prompt", "a dog"],
            "--class_prompt has no effect without --with_prior_preservation or --prior_preservation base_output",
        ),
        (["--class_data_dir", "dogs"], "--class_data_dir has no effect without --with_prior_preservation"),
        (["--base_l2_weight", "1"], "--base_l2_weight has no effect without --prior_preservation base_l2"),
        (["--lr_warmup_steps", "9"], "--lr_warmup_steps has no effect with --lr_scheduler constant"),
        (["--huber_c", "0.2"], "--huber_c has no effect without --loss_type huber or smooth_l1"),
        (
            ["--multires_noise_discount", "0.2"],
            "--multires_noise_discount has no effect without --multires_noise_iterations",
        ),
        (
            ["--timestep_bias_strategy", "later", "--timestep_bias_end", "9"],
            "--timestep_bias_end has no effect without --timestep_bias_strategy range",
        ),
        (["--lr_power", "2"], "--lr_power has no effect without --lr_scheduler polynomial"),
        (["--lr_num_cycles", "2"], "--lr_num_cycles has no effect without --lr_scheduler cosine_with_restarts"),
        (
            ["--num_train_epochs", "2", "--max_train_steps", "9"],
            "--num_train_epochs has no effect beside --max_train_steps",
        ),
        (["--method", "full", "--rank", "8"], "--rank has no effect with --method full"),
        (["--method", "full", "--lora_dropout", "0.1"], "--lora_dropout has no effect with --method full"),
        (["--ema_decay", "0.99"], "--ema_decay has no effect without --use_ema"),
        (
            ["--text_encoder_lr", "1e-6"],
            "--text_encoder_lr has no effect without --train_text_encoder or --modifier_token",
        ),
        (["--init_loss_scale", "9"], "--init_loss_scale has no effect without --mixed_precision fp16 or auto"),
        (
            ["--mixed_precision", "fp16", "--loss_scaler_type", "static", "--scale_window", "9"],
            "--scale_window has no effect with --loss_scaler_type static",
        ),
        (["--optimizer", "prodigy", "--use_8bit_adam"], "--use_8bit_adam has no effect with --optimizer prodigy"),
        (["--optimizer", "adafactor", "--adam_beta1", "0"], "--adam_beta1 has no effect with --optimizer adafactor"),
        (["--prodigy_beta3", "0.9"], "--prodigy_beta3 has no effect without --optimizer prodigy"),
        (["--adafactor_scale_parameter"], "--adafactor_scale_parameter has no effect without --optimizer adafactor"),
        (
            ["--optimizer", "prodigy", "--learning_rate", "1e-4"],
            "--learning_rate 0.0001 multiplies what prodigy finds by itself; it is usually 1",
        ),
        (["--validation_steps", "9"], "--validation_steps has no effect without --validation_prompt"),
        (
            ["--validation_prompt", "x", "--validation_steps", "9", "--validation_epochs", "1"],
            "--validation_steps has no effect beside --validation_epochs",
        ),
        (
            ["--max_train_steps", "500", "--lr_scheduler", "cosine"],
            "--lr_warmup_steps 500 is not less than --max_train_steps 500: "
            "the learning rate never arrives at --learning_rate",
        ),
    ],
)
def test_what_is_doubtful_is_noted(flags, note):
    assert notes(TrainConfig, [*REQUIRED, *flags]) == (note,)


@pytest.mark.parametrize(
    "flags",
    [
        PRIOR,
        ["--lr_warmup_steps", "0"],
        ["--lr_warmup_steps", "0", "--lr_scheduler", "linear"],
        ["--lr_num_cycles", "2", "--lr_scheduler", "cosine_with_restarts"],
        ["--lr_power", "2", "--lr_scheduler", "polynomial"],
        ["--num_train_epochs", "2"],
        ["--max_train_steps", "400"],
        ["--max_train_steps", "501", "--lr_scheduler", "cosine"],
        ["--method", "full", "--train_text_encoder", "--text_encoder_lr", "1e-6", "--use_ema", "--ema_decay", "0.99"],
        ["--lora_dropout", "0.1", "--snr_gamma", "5", "--noise_offset", "0.2", "--scale_lr"],
        ["--mixed_precision", "fp16", "--init_loss_scale", "9", "--loss_scale_factor", "4", "--scale_window", "9"],
        ["--optimizer", "prodigy", "--prodigy_beta3", "0.9", "--no-prodigy_decouple", "--adam_beta1", "0.8"],
        ["--optimizer", "adafactor", "--adafactor_scale_parameter", "--adam_weight_decay", "0"],
        ["--use_8bit_adam", "--adam_epsilon", "1e-6"],
        ["--validation_prompt", "a dog", "--validation_steps", "9", "--num_validation_images", "1"],
    ],
)
def test_what_makes_sense_is_not_noted(flags):
    assert notes(TrainConfig, [*REQUIRED, *flags]) == ()


def test_what_has_no_effect_in_sampling_is_noted():
    flags = ["--lora_scale", "0.5", "--negative_prompt", "blurry", "--guidance_scale", "1"]
    assert notes(SampleConfig, [*SAMPLE_REQUIRED, *flags]) == (
        "--lora_scale has no effect without --lora",
        "--negative_prompt has no effect with a --guidance_scale of 1 or less",
    )


def test_notes_are_told_or_printed(capsys):
    notes = []
    load(TrainConfig, [*REQUIRED, "--allow_tf32"], tell=notes.append)
    assert (len(notes), capsys.readouterr().err) == (1, "")
    load(TrainConfig, [*REQUIRED, "--allow_tf32"])
    assert capsys.readouterr().err == f"dreambooth-ms: note: {notes[0]}\n"


# --- Help ---


@EVERY_SCHEMA
def test_help_names_every_field_with_its_text_and_default(schema):
    text = re.sub(r"\s+", " ", describe(schema))
    for name, one in schema_fields(schema).items():
        documentation = re.sub(r"\s+", " ", field_documentation(sections(schema)[one.section])[name])
        assert f"--{name} {one.placeholder} {documentation} (" in text


def test_help_states_the_range_and_the_choices():
    text = re.sub(r"\s+", " ", describe(TrainConfig))
    assert "--rank N Rank of the LoRA update; the size of the file grows with it. (at least 1; default: 4)" in text
    assert "--image_interpolation_mode {nearest,bilinear,bicubic,lanczos} " in text


def test_help_says_what_is_required():
    assert describe(TrainConfig).count("(required)") == 1
    assert describe(TrainConfig).count("Required ") == 2


@pytest.mark.parametrize("module", [commands, sample, shared, train_schema])
def test_schema_docstrings_are_all_attached_to_something(module):
    """A string that follows no field would be documentation that nobody sees."""
    for definition in ast.parse(inspect.getsource(module)).body:
        if isinstance(definition, ast.ClassDef):
            for before, after in zip(definition.body, definition.body[1:], strict=False):
                if isinstance(after, ast.Expr):
                    assert isinstance(before, ast.AnnAssign)

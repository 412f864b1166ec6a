"""The options of `embed`: what they are by default, and what is refused before anything runs."""

import dataclasses
import re

import pytest
from apache_beam.options.pipeline_options import DirectOptions, FlinkRunnerOptions, PipelineOptions

from pipeline import options
from pipeline.options import EmbedOptions, parse

DEFAULTS = {
    "input": (),
    "input_format": "auto",
    "text_field": None,
    "id_field": None,
    "keep_fields": (),
    "max_document_bytes": 64 << 20,
    "output": "output",
    "rows_per_shard": 250_000,
    "compression": "zstd",
    "full": False,
    "skip_unchanged": False,
    "max_rejected_fraction": 0.01,
    "keep_snapshots": None,
    "checkpoint": "default",
    "max_tokens": None,
    "dtype": "auto",
    "device": "auto",
    "max_batch_tokens": None,
    "runner": "local",
    "bucket": None,
    "gpu": None,
    "gpu_everywhere": False,
    "dry_run": False,
    "beam_options": ("--runner=FnApiRunner",),
}
"""Where one is None, the option's help says what that stands for."""

GIVEN = {
    "input": ("gs://bucket/a.txt", "gs://bucket/*.gz"),
    "input_format": "csv",
    "text_field": ("title", "body"),
    "id_field": "url",
    "keep_fields": ("lang,stars:int16",),
    "max_document_bytes": 1000,
    "output": "gs://bucket/out",
    "rows_per_shard": 10,
    "compression": "none",
    "full": True,
    "skip_unchanged": True,
    "max_rejected_fraction": 0.5,
    "keep_snapshots": 3,
    "checkpoint": "gs://bucket/head",
    "max_tokens": 512,
    "dtype": "bfloat16",
    "device": "cuda",
    "max_batch_tokens": 4096,
    "runner": "dataflow",
    "bucket": "bucket",
    "gpu": "nvidia-l4",
    "gpu_everywhere": True,
    "dry_run": True,
    "beam_options": (
        "--runner=DataflowRunner",
        "--project=my-project-123",
        "--region=r",
        "--sdk_container_image=image",
    ),
}


def refusal(capsys, *argv: str) -> str:
    """Returns the message with which options are refused as wrong usage."""
    with pytest.raises(SystemExit) as refused:
        parse(argv)
    assert refused.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()[-1].removeprefix("python -m pipeline embed: error: ")


def help_of(capsys, option: str) -> str:
    with pytest.raises(SystemExit) as asked:
        parse([option])
    assert asked.value.code == 0
    return capsys.readouterr().out


def test_the_defaults():
    assert dataclasses.asdict(parse([])) == DEFAULTS


def test_every_option_is_taken():
    argv = [
        "--full",
        "--skip_unchanged",
        "--gpu_everywhere",
        "--dry_run",
        "--keep_fields=lang,stars:int16",
        *GIVEN["beam_options"][1:],
    ]
    for name in ("input", "text_field"):
        argv += [word for value in GIVEN[name] for word in (f"--{name}", value)]
    skipped = {
        "full",
        "skip_unchanged",
        "gpu_everywhere",
        "dry_run",
        "keep_fields",
        "input",
        "text_field",
        "beam_options",
    }
    argv += [f"--{name}={value}" for name, value in GIVEN.items() if name not in skipped]
    parsed = dataclasses.asdict(parse(argv))
    assert set(GIVEN["beam_options"]) <= set(parsed.pop("beam_options"))
    assert parsed == {name: value for name, value in GIVEN.items() if name != "beam_options"}
    assert all(DEFAULTS[name] != GIVEN[name] for name in DEFAULTS)


# Options of Beam.


def test_options_of_beam_reach_beam():
    parsed = parse(["--direct_num_workers=2", "--output", "out", "--flink_master", "host:8081", "--experiments=a"])
    assert parsed.output == "out"
    beam_options = PipelineOptions(list(parsed.beam_options))
    assert beam_options.view_as(DirectOptions).direct_num_workers == 2
    assert beam_options.view_as(FlinkRunnerOptions).flink_master == "host:8081"
    assert beam_options.get_all_options()["runner"] == "FnApiRunner"
    assert beam_options.get_all_options()["experiments"] == ["a"]


def test_no_option_of_ours_hides_one_of_beams():
    """But for --runner, whose value is handed on, and --dry_run, which Beam has for Dataflow alone."""
    ours, beams = (set(parser._option_string_actions) for parser in (options._parser(), options._beam_parser()))
    assert ours & beams == {"--runner", "--dry_run"}


def test_a_wrong_value_of_beams_option_is_named_without_all_the_others(capsys):
    with pytest.raises(SystemExit) as refused:
        parse(["--direct_num_workers=many"])
    assert refused.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "usage: python -m pipeline embed [options]",
        "python -m pipeline embed: error: argument --direct_num_workers: invalid int value: 'many'",
    ]


# What is refused.


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ouptut=x"], "unknown option --ouptut=x; did you mean --output?"),
        (["--ouptut", "x"], "unknown option --ouptut; did you mean --output?"),
        (
            ["--streaming"],
            "--streaming is for input that never ends, and a corpus ends: leave it out, and run again on change",
        ),
        (["--rows-per-shard=3"], "unknown option --rows-per-shard=3; did you mean --rows_per_shard?"),
        (["--flink_mster=h:1"], "unknown option --flink_mster=h:1; did you mean --flink_master?"),
        (["--max_rejected=0.5"], "unknown option --max_rejected=0.5; did you mean --max_rejected_fraction?"),
        (["--qqqqqqqq"], "unknown option --qqqqqqqq"),
    ],
)
def test_an_unknown_option_is_refused_and_the_closest_named(capsys, argv, message):
    assert refusal(capsys, *argv) == message


@pytest.mark.parametrize(
    "argv",
    [
        ["stray", "--full"],
        ["--full", "stray"],
        ["--input=a.txt", "stray"],
        ["--text_field", "title", "stray", "--full"],
    ],
)
def test_a_word_that_belongs_to_no_option_is_refused(capsys, argv):
    assert refusal(capsys, *argv).startswith("'stray' belongs to no option: only --input takes several values; ")


def test_an_input_may_be_several_paths_as_the_shell_makes_them_of_a_glob():
    argv = ["--input", "data/a.jsonl", "data/b.jsonl", "--full", "--input", "*.csv", "--flink_master", "host:8081"]
    parsed = parse(argv)
    assert parsed.input == ("data/a.jsonl", "data/b.jsonl", "*.csv")
    assert parsed.beam_options[-2:] == ("--flink_master", "host:8081")


def test_fields_to_keep_add_up():
    assert parse(["--keep_fields=a,b:int64", "--keep_fields=", "--keep_fields", "c"]).keep_fields == ("a,b:int64", "c")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--keep_fields=f,,i"], "--keep_fields has an empty name: 'f,,i'"),
        (["--keep_fields=f", "--keep_fields=f:int64"], "--keep_fields names 'f' twice"),
        (["--output="], "argument --output: '' is neither a folder of this machine nor gs://bucket/folder: "),
        (["--output=s3://bucket/out"], "argument --output: 's3://bucket/out' is neither a folder of this machine nor "),
    ],
)
def test_values_that_no_input_could_suit_are_wrong_usage(capsys, argv, message):
    assert message in refusal(capsys, *argv)


@pytest.mark.parametrize("option", ["--out=x", "--in=x", "--rows=5", "--direct_num=2", "--flink_m=x", "--help_b"])
def test_abbreviations_are_refused(capsys, option):
    assert refusal(capsys, option).startswith(f"unknown option {option}")


@pytest.mark.parametrize(
    "option", ["rows_per_shard", "max_document_bytes", "keep_snapshots", "max_tokens", "max_batch_tokens"]
)
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many", ""])
def test_numbers_below_one_are_refused(capsys, option, value):
    message = refusal(capsys, f"--{option}={value}")
    assert message == f"argument --{option}: {value!r} is not a whole number of at least 1"


@pytest.mark.parametrize("value", ["-0.1", "1.01", "nan", "inf", "few", ""])
def test_fractions_outside_0_to_1_are_refused(capsys, value):
    message = refusal(capsys, f"--max_rejected_fraction={value}")
    assert message == f"argument --max_rejected_fraction: {value!r} is not a number from 0 to 1"


@pytest.mark.parametrize("value", ["0", "1", "1e-3"])
def test_fractions_from_0_to_1_are_taken(value):
    assert parse([f"--max_rejected_fraction={value}"]).max_rejected_fraction == float(value)


@pytest.mark.parametrize("option", ["input_format", "compression", "dtype", "device"])
def test_a_value_that_is_no_choice_is_refused_and_the_choices_named(capsys, option):
    message = refusal(capsys, f"--{option}=xml")
    assert message.startswith(f"argument --{option}: invalid choice: 'xml' (choose from ")
    assert DEFAULTS[option] in message


def test_an_unknown_runner_is_refused_and_the_known_ones_named(capsys):
    message = refusal(capsys, "--runner=floink")
    assert message.startswith("argument --runner: no runner is called 'floink': take local, ")
    assert "flink, dataflow" in message


@pytest.mark.parametrize("option", ["--output", "--runner", "--direct_num_workers"])
def test_an_option_without_its_value_is_refused(capsys, option):
    assert refusal(capsys, option) == f"argument {option}: expected one argument"


# Help.


def test_help_groups_the_options_and_says_units_and_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(capsys, "--help")
    groups = dict(re.findall(r"^(\w+):\n((?:(?: .*)?\n)+)", text, re.MULTILINE))
    assert [title for title in groups if title != "options"] == ["input", "output", "encoder", "Dataflow", "running"]
    described = {
        option: " ".join(body.split())
        for group in groups.values()
        for option, body in re.findall(r"^  --(\w+)((?:.|\n {4})*)", group, re.MULTILINE)
    }
    names = {field.name for field in dataclasses.fields(EmbedOptions)} - {"beam_options"}
    assert set(described) == names | {"help_beam"}
    for name in names - {"full", "skip_unchanged", "gpu_everywhere", "dry_run"}:
        assert "default" in described[name], name
    for name in ("rows_per_shard", "max_document_bytes", "max_tokens", "max_batch_tokens", "max_rejected_fraction"):
        unit = name.rpartition("_")[2].replace("shard", "rows").upper()
        assert f"{unit} " in described[name], name
    for name, default in {"rows_per_shard": "250000", "max_tokens": "8192", "max_rejected_fraction": "0.01"}.items():
        assert re.search(rf"default:? (the checkpoint's, )?{re.escape(default)}$", described[name])
    assert "Exit status: 0 published; 1 the job failed; 2 wrong usage; 3 finished" in " ".join(text.split())


def test_help_beam_describes_the_options_of_every_runner(capsys):
    text = help_of(capsys, "--help_beam")
    for option in ("--direct_num_workers", "--flink_master", "--prism_location", "--region", "--job_endpoint"):
        assert f"  {option} " in text


def test_every_attribute_of_the_options_is_documented():
    documented = re.findall(r"^      (\w+): ", EmbedOptions.__doc__ or "", re.MULTILINE)
    assert documented == [field.name for field in dataclasses.fields(EmbedOptions)]

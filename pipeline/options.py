"""Every option of the embedding job, checked before anything runs."""

import argparse
import difflib
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone

from apache_beam.options.pipeline_options import PipelineOptions

from pipeline import dataflow, flink
from pipeline.dataflow_machines import device_for
from pipeline.option_types import fraction, output_folder, positive
from pipeline.runners import runner_options
from transforms.devices import DEVICES, DTYPES
from transforms.fields import TYPE_EXAMPLES, parse_kept_fields
from transforms.read import INPUT_FORMATS, MAX_DOCUMENT_BYTES
from transforms.write import COMPRESSIONS, ROWS_PER_SHARD


@dataclass(frozen=True)
class EmbedOptions:
    """The options of the job, by their names on the command line.

    Attributes:
      input: globs; empty for the sample corpus.
      input_format: auto, text, jsonl, csv, parquet or file.
      text_field: fields whose values make up the text; None where not given.
      id_field: the field of the id; None where not given.
      keep_fields: fields to copy, `name` or `name:type`, parted by commas.
      max_document_bytes: the longest record.
      output: folder of the snapshots.
      rows_per_shard: the most rows of a file.
      compression: Parquet codec.
      full: whether the last snapshot and saved work are ignored.
      skip_unchanged: whether a run that finds nothing changed ends at once.
      max_rejected_fraction: of the records read; more is not published.
      keep_snapshots: how many published snapshots stay; all where None.
      checkpoint: the encoder's.
      max_tokens: the most tokens of a text; the checkpoint's own where None.
      dtype: BERT's number type.
      device: where it runs.
      max_batch_tokens: padded area of a batch; by device where None.
      runner: Beam runner.
      bucket: of Cloud Storage, for Dataflow; None where not given.
      gpu: of the machines that encode, on Dataflow; None where they have none.
      gpu_everywhere: whether all machines have it.
      dry_run: whether the job is only shown.
      beam_options: all options of Beam, the runner's included.
    """

    input: tuple[str, ...]
    input_format: str
    text_field: tuple[str, ...] | None
    id_field: str | None
    keep_fields: tuple[str, ...]
    max_document_bytes: int
    output: str
    rows_per_shard: int
    compression: str
    full: bool
    skip_unchanged: bool
    max_rejected_fraction: float
    keep_snapshots: int | None
    checkpoint: str
    max_tokens: int | None
    dtype: str
    device: str
    max_batch_tokens: int | None
    runner: str
    bucket: str | None
    gpu: str | None
    gpu_everywhere: bool
    dry_run: bool
    beam_options: tuple[str, ...]


def parse(argv: Sequence[str]) -> EmbedOptions:
    """Parses the options of `embed`.

    Args:
      argv: the options as given.

    Raises:
      SystemExit: 2, with a message that names the option, for one that nobody knows or a value out of range; 0 after
        `--help` or `--help_beam`.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.help_beam:
        _beam_parser().print_help()
        sys.exit(0)
    try:
        beam_options = [*runner_options(arguments.runner), *rest]
    except ValueError as error:
        parser.error(f"argument --runner: {error}")
    _check_beam_options(parser, beam_options)
    values = vars(arguments)
    del values["help_beam"]
    values["input"] = tuple(arguments.input)
    values["text_field"] = tuple(arguments.text_field) if arguments.text_field else None
    values["keep_fields"] = tuple(filter(None, arguments.keep_fields))
    output = values.pop("output")
    options = EmbedOptions(**values, output="output" if output is None else output, beam_options=tuple(beam_options))
    try:
        parse_kept_fields(options.keep_fields)
        if dataflow.is_dataflow(options.runner):
            return _for_dataflow(options, output)
        options = _without_dataflow(options)
        return _for_flink(options, output) if flink.is_flink(options.runner) else options
    except ValueError as error:
        parser.error(str(error))


def given_options(argv: Sequence[str]) -> dict[str, str | bool | list[str]]:
    """Returns the options of `embed` and Beam that are given, by name: text, texts where repeatable, or a switch.

    Args:
      argv: options that `parse` takes.
    """
    given: dict[str, str | bool | list[str]] = {}
    rest = list(argv)
    for parser in (_parser(), _beam_parser()):
        for action in parser._actions:
            action.default, action.type = argparse.SUPPRESS, None
        arguments, rest = parser.parse_known_args(rest)
        given |= vars(arguments)
    return given


def _for_dataflow(options: EmbedOptions, output: str | None) -> EmbedOptions:
    """Returns the options with what Dataflow needs; `output` is the one given."""
    beam_options = dataflow.complete(
        options.beam_options,
        options.bucket,
        options.gpu,
        options.gpu_everywhere,
        f"embed-corpus-{datetime.now(timezone.utc):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}",
        dataflow.setup_file(),
    )
    if output is None and options.bucket is not None:
        options = replace(options, output=f"{dataflow.bucket_folder(options.bucket)}/output")
    if options.skip_unchanged and dataflow.is_launch(beam_options):
        raise ValueError("--skip_unchanged has no place in a template's launch, which must start a job: leave it out")
    dataflow.check_paths(options.input, options.output, options.checkpoint, beam_options)
    device = device_for(options.device, options.gpu, beam_options)
    return replace(options, device=device, beam_options=tuple(beam_options))


def _for_flink(options: EmbedOptions, output: str | None) -> EmbedOptions:
    """Returns the options with what Flink needs; `output` is the one given."""
    beam_options = flink.complete(options.beam_options, dataflow.setup_file())
    flink.check_paths(options.input, output, beam_options)
    return replace(options, beam_options=tuple(beam_options))


def _without_dataflow(options: EmbedOptions) -> EmbedOptions:
    for name in ("bucket", "gpu", "gpu_everywhere"):
        if getattr(options, name):
            raise ValueError(f"--{name} is for Dataflow: add --runner=dataflow, or leave it out")
    return options


def _check_beam_options(parser: argparse.ArgumentParser, beam_options: Sequence[str]) -> None:
    """Ends with usage 2 at an option that Beam does not know, which Beam itself would only warn about."""
    beam_parser = _beam_parser()
    known_options, unknown = beam_parser.parse_known_args(list(beam_options))
    if unknown and not unknown[0].startswith("-"):
        parser.error(
            f"{unknown[0]!r} belongs to no option: only --input takes several values; others are given again for each, "
            "and a value with spaces goes in quotes"
        )
    if unknown:
        known = [option for one in (parser, beam_parser) for option in one._option_string_actions]
        close = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        parser.error(f"unknown option {unknown[0]}{hint}")
    if known_options.streaming:
        parser.error(
            "--streaming is for input that never ends, and a corpus ends: leave it out, and run again on change"
        )


def _beam_parser() -> argparse.ArgumentParser:
    """Returns a parser of all options that Beam's runners know."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline embed",
        usage="%(prog)s [options]",  # Beam's are too many to list them before each error.
        add_help=False,
        allow_abbrev=False,
        conflict_handler="resolve",
    )
    pending = [PipelineOptions]
    while pending:
        options_class = pending.pop()
        pending.extend(options_class.__subclasses__())
        if "_add_argparse_args" in vars(options_class):
            options_class._add_argparse_args(parser)  # type: ignore[arg-type] # All they need is add_argument.
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline embed",
        description="Embeds a text corpus and publishes a snapshot of 256-dimensional embeddings.",
        epilog="Every option of the chosen Beam runner is taken too: --help_beam lists them. "
        "Exit status: 0 published; 1 the job failed; 2 wrong usage; 3 finished but not published.",
        allow_abbrev=False,
    )
    _add_input_options(parser.add_argument_group("input"))
    _add_output_options(parser.add_argument_group("output"))
    _add_encoder_options(parser.add_argument_group("encoder"))
    _add_dataflow_options(parser.add_argument_group("Dataflow", "with --project and --region, and all of Beam's"))
    running = parser.add_argument_group("running")
    running.add_argument(
        "--runner",
        default="local",
        metavar="NAME",
        help="local, prism, flink, dataflow, or any runner Beam knows; default local: Beam's in-process runner",
    )
    running.add_argument(
        "--dry_run", action="store_true", help="show the runner's options and the job's steps; read and run nothing"
    )
    running.add_argument("--help_beam", action="store_true", help="show the options of Beam and its runners, and exit")
    return parser


def _add_input_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--input",
        action="extend",
        nargs="+",  # A glob without quotes arrives as the files that the shell makes of it.
        default=[],
        metavar="GLOB",
        help="files to read, local or gs://; repeatable; put globs in quotes, which `**` needs; default: the sample "
        "corpus, Python's own docstrings",
    )
    group.add_argument(
        "--input_format",
        choices=INPUT_FORMATS,
        default="auto",
        help="auto goes by the extension, under any of .gz .bz2 .xz .zst; text: a document per line; file: a document "
        "per file; default auto",
    )
    group.add_argument(
        "--text_field",
        action="append",
        metavar="NAME",
        help="field of the text; repeatable, joined by a newline; default text",
    )
    group.add_argument(
        "--id_field", metavar="NAME", help="field of the id; default id, or the content hash where there is none"
    )
    group.add_argument(
        "--keep_fields",
        action="append",
        default=[],
        metavar="A,B:TYPE",
        help="fields copied to the output with their types; a type after a colon overrides the one found: "
        f"{TYPE_EXAMPLES}, ...; repeatable; default none",
    )
    group.add_argument(
        "--max_document_bytes",
        type=positive,
        default=MAX_DOCUMENT_BYTES,
        metavar="BYTES",
        help="a longer record is rejected as too_large; default %(default)s",
    )


def _add_output_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output",
        type=output_folder,
        metavar="DIR",
        help="local or gs:// folder; default output; with --bucket, gs://BUCKET/output",
    )
    group.add_argument(
        "--rows_per_shard",
        type=positive,
        default=ROWS_PER_SHARD,
        metavar="ROWS",
        help=f"the most rows of a Parquet file; default {ROWS_PER_SHARD}",
    )
    group.add_argument("--compression", choices=COMPRESSIONS, default="zstd", help="of the Parquet files; default zstd")
    group.add_argument(
        "--full",
        action="store_true",
        help="encode every text anew: ignore the vectors of the last snapshot and of unfinished runs",
    )
    group.add_argument(
        "--skip_unchanged",
        action="store_true",
        help="end with status 0 and publish nothing where no input file (by path, size and time), checkpoint or "
        "option of input and output changed since a run with this option published",
    )
    group.add_argument(
        "--max_rejected_fraction",
        type=fraction,
        default=0.01,
        metavar="FRACTION",
        help="publish nothing, and end with status 3, if more of the records are rejected, blank lines of "
        "text files not counted; default %(default)s",
    )
    group.add_argument(
        "--keep_snapshots",
        type=positive,
        metavar="N",
        help="after publishing, remove older snapshots, but never the last two; default: keep all",
    )


def _add_encoder_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--checkpoint", default="default", metavar="NAME", help="shipped name, folder or gs:// folder; default default"
    )
    group.add_argument(
        "--max_tokens",
        type=positive,
        metavar="TOKENS",
        help="longer texts are cut there and marked truncated; default: the checkpoint's, 8192",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="numbers BERT computes in; auto: bfloat16 where the device has it natively and is faster in it, else "
        "float16 on a GPU and float32 on a CPU; default auto",
    )
    group.add_argument(
        "--device", choices=DEVICES, default="auto", help="cuda fails where there is no GPU; default auto"
    )
    group.add_argument(
        "--max_batch_tokens",
        type=positive,
        metavar="TOKENS",
        help="padded tokens of one BERT batch; default 2048 on a CPU, 65536 on a GPU, halved when its memory is full",
    )


def _add_dataflow_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--bucket",
        metavar="NAME",
        help="bucket of Cloud Storage, or gs://BUCKET/FOLDER, for temporary files and, by default, the output",
    )
    group.add_argument(
        "--gpu",
        metavar="NAME",
        help="GPU of the machines that encode, nvidia-l4 say, or a whole request: type:NAME;count:1;machine_type:...; "
        "reading and tokenizing run on machines without; starts sooner with --sdk_container_image; default none",
    )
    group.add_argument(
        "--gpu_everywhere", action="store_true", help="give all machines the GPU, not only those that encode"
    )

"""ReadDocuments: files, local or on gs://, to documents and rejected records."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import apache_beam as beam
import pyarrow as pa
from apache_beam.metrics import Metrics

from transforms import progress
from transforms.csv_rows import delimiter_of, read_csv
from transforms.decompress import CorruptStreamError, TruncatedStreamError, decompress, split_codec
from transforms.fields import Converter, json_converter, text_converter
from transforms.files import InputFile, RawFile, match_files, open_file
from transforms.formats import INPUT_FORMATS, file_format, read_jsonl, read_text, read_whole
from transforms.inputs import InputPlan, plan_inputs
from transforms.lines import Lines, LongLine, read_lines, read_range
from transforms.parquet_rows import CorruptParquetError, ParquetInput, RowGroups, check_columns, parquet_converters
from transforms.records import DocumentMaker
from transforms.schema import Document, Rejected

__all__ = ["INPUT_FORMATS", "MAX_DOCUMENT_BYTES", "InputPlan", "ReadDocuments", "plan_inputs"]

MAX_DOCUMENT_BYTES = 64 << 20
"""The longest record, unless another limit is given."""

SPLIT_BYTES = 64 << 20
"""About how much of a large file is read as one unit of work."""

_REPORT_EVERY = 1000
"""After how many records counters move on."""


@dataclass
class ReadDocuments(beam.PTransform):
    """Reads documents from files; the root of a pipeline.

    `documents, rejected = pipeline | ReadDocuments(["gs://bucket/*.jsonl.gz"])`. Each record read is in exactly one
    of the two. `plan_inputs` finds the arguments that suit given files, and what is wrong with them, before a job
    starts; `from_plan` takes its result.

    A document's position is its line from 1 (of CSV, the row's first line), its row in a Parquet file from 0, and 0
    for a document per file. Text and JSON Lines files over `split_bytes` are read in ranges; there it is the byte
    offset of the line. A file that cannot be read fails the job.

    Args:
      patterns: globs, local or gs://; a file that several match is read once.
      input_format: `auto` (by extension), `text` (a document per line), `jsonl`, `csv`, `parquet` or `file` (a
        document per file). All but Parquet may be compressed, by their extension: .gz, .bz2, .xz, .zst.
      text_fields: fields of the text, joined by newlines.
      id_field: field of the id; None names documents by the hash of their text, as `text` and `file` always do.
      kept_fields: fields copied to `Document.fields`, with their types.
      max_document_bytes: a longer line, row, text or file is rejected.
      split_bytes: about how much of an uncompressed file is one unit of work.
      output: an output folder, absolute or gs://; what runs wrote there is no input.
    """

    patterns: Sequence[str]
    input_format: str = "auto"
    text_fields: Sequence[str] = ("text",)
    id_field: str | None = "id"
    kept_fields: pa.Schema = field(default_factory=lambda: pa.schema([]))
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    split_bytes: int = SPLIT_BYTES
    output: str | None = None

    def __post_init__(self) -> None:
        super().__init__()
        if self.input_format not in INPUT_FORMATS:
            raise ValueError(f"input_format must be one of {', '.join(INPUT_FORMATS)}, not {self.input_format!r}")
        if isinstance(self.patterns, str) or not self.patterns:
            raise ValueError(f"patterns must be one or more globs in a list, not {self.patterns!r}")
        if isinstance(self.text_fields, str) or not self.text_fields:
            raise ValueError(f"text_fields must be one or more names in a list, not {self.text_fields!r}")
        for name in ("max_document_bytes", "split_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @classmethod
    def from_plan(cls, plan: InputPlan, max_document_bytes: int = MAX_DOCUMENT_BYTES) -> "ReadDocuments":
        """Returns the transform that reads what was planned."""
        return cls(
            plan.patterns,
            plan.input_format,
            plan.text_fields,
            plan.id_field,
            plan.kept_fields,
            max_document_bytes,
            output=plan.output,
        )

    def expand(self, pipeline):
        """Returns the documents and the rejected records."""
        spec = ReadSpec(
            self.input_format,
            tuple(self.text_fields),
            self.id_field,
            self.kept_fields,
            self.max_document_bytes,
            self.split_bytes,
        )
        parts = (
            pipeline
            | "Patterns" >> beam.Create(list(self.patterns), reshuffle=False)
            | "MatchFiles" >> beam.FlatMap(_match, self.output)
            # Globs may overlap; a grouping also fixes what was matched before anything depends on it.
            | "GroupByPath" >> beam.GroupByKey()
            | "OneOfEach" >> beam.MapTuple(_one_of_each)
            | "SplitFiles" >> beam.FlatMap(split_file, spec)
            | "SpreadParts" >> beam.Reshuffle()
        )
        records = parts | "ReadParts" >> beam.ParDo(_ReadPart(spec)).with_outputs("rejected", main="documents")
        return records.documents, records.rejected


class ReadSpec(NamedTuple):
    """How files are read; the fields are those of `ReadDocuments`."""

    input_format: str
    text_fields: tuple[str, ...]
    id_field: str | None
    kept_fields: pa.Schema
    max_document_bytes: int
    split_bytes: int


class Part(NamedTuple):
    """A part of a file that is read as one unit of work.

    Attributes:
      file: which file.
      format: one of `formats.FORMATS`.
      start: the part's first byte; of Parquet its first row group.
      stop: the first byte or row group after it.
      first_row: of Parquet, how many rows are before it.
      corrupt: why there is nothing to read in the file; else empty.
    """

    file: InputFile
    format: str
    start: int
    stop: int
    first_row: int = 0
    corrupt: str = ""


def split_file(file: InputFile, spec: ReadSpec) -> Iterator[Part]:
    """Yields a file's parts, which together are the file.

    Raises:
      ValueError: its format is unknown, or a Parquet file lacks a column or has one of a wrong type.
      OSError: it cannot be read.
    """
    format_ = file_format(file.path, spec.input_format)
    if format_ == "parquet":
        yield from _split_parquet(file, spec)
    elif format_ in ("text", "jsonl") and split_codec(file.path)[1] is None:
        for start in range(0, file.size_bytes, spec.split_bytes):
            yield Part(file, format_, start, min(start + spec.split_bytes, file.size_bytes))
    else:
        yield Part(file, format_, 0, file.size_bytes)


def _split_parquet(file: InputFile, spec: ReadSpec) -> Iterator[Part]:
    with closing(open_file(file.path)) as opened:
        try:
            parquet = ParquetInput(opened)
        except CorruptParquetError as error:
            yield Part(file, "parquet", 0, 0, corrupt=f"the footer cannot be decoded, the whole file is lost: {error}")
            return
        check_columns(parquet.schema, file.path, spec.text_fields, spec.id_field, spec.kept_fields)
        for groups in parquet.plan_row_groups(spec.split_bytes):
            yield Part(file, "parquet", *groups)


def read_part(part: Part, spec: ReadSpec) -> Iterator[Document | Rejected]:
    """Yields every record of a part of a file, as a document or as a rejected record.

    Raises:
      ValueError: a CSV file lacks a column.
      OSError: the file cannot be read, or is shorter than it was.
    """
    path = part.file.path
    if part.corrupt:
        yield Rejected(path, 0, "", "corrupt_file", part.corrupt, "")
        return
    with closing(open_file(path)) as opened:
        if part.format == "parquet":
            yield from _read_parquet(part, opened, spec)
        elif part.stop - part.start < part.file.size_bytes:
            lines = read_range(opened, part.start, part.stop, part.file.size_bytes, spec.max_document_bytes)
            for record in _read_lines_as(part.format, lines, path, spec):
                yield _by_offset(record)
        else:
            yield from _read_stream(part, opened.chunks(part.file.size_bytes), spec)


def _read_parquet(part: Part, opened: RawFile, spec: ReadSpec) -> Iterator[Document | Rejected]:
    try:
        parquet = ParquetInput(opened)
    except CorruptParquetError as error:
        raise OSError(f"{opened.path} was changed while it was being read: start again") from error
    groups = RowGroups(part.start, part.stop, part.first_row)
    make_document = _document_maker(spec, parquet_converters(spec.kept_fields))
    return parquet.read(groups, make_document, spec.kept_fields, spec.max_document_bytes)


def _read_stream(part: Part, chunks: Iterable[bytes], spec: ReadSpec) -> Iterator[Document | Rejected]:
    """Yields the records of a whole file; where its compression breaks off, one rejected record for the rest."""
    path = part.file.path
    codec = split_codec(path)[1]
    if codec:
        chunks = decompress(chunks, codec)
    lines = _NumberedLines(read_lines(chunks, spec.max_document_bytes, keep_ends=part.format == "csv"))
    try:
        if part.format == "file":
            yield from read_whole(chunks, path, spec.max_document_bytes)
        else:
            yield from _read_lines_as(part.format, lines, path, spec)
    except (TruncatedStreamError, CorruptStreamError) as error:
        reason = "truncated_file" if isinstance(error, TruncatedStreamError) else "corrupt_file"
        if part.format == "file":
            yield Rejected(path, 0, "", reason, str(error), "")
        else:
            detail = f"{error}; what follows its {lines.number} whole lines is lost"
            if reason == "corrupt_file":
                detail += ", and these may be damaged too"
            yield Rejected(path, lines.number + 1, "", reason, detail, "")


def _read_lines_as(format_: str, lines: Lines, path: str, spec: ReadSpec) -> Iterator[Document | Rejected]:
    if format_ == "text":
        return read_text(lines, path)
    if format_ == "jsonl":
        converters = {kept.name: json_converter(kept.type) for kept in spec.kept_fields}
        return read_jsonl(lines, path, _document_maker(spec, converters))
    converters = {kept.name: text_converter(kept.type) for kept in spec.kept_fields}
    return read_csv(lines, path, _document_maker(spec, converters), delimiter_of(path), spec.max_document_bytes)


class _NumberedLines:
    """Lines with their numbers from 1 in place of their offsets; `number` is that of the last one taken."""

    def __init__(self, lines: Lines):
        self._lines = lines
        self.number = 0

    def __iter__(self) -> Iterator[tuple[int, bytes | LongLine]]:
        for _, line in self._lines:
            self.number += 1
            yield self.number, line


def _document_maker(spec: ReadSpec, converters: dict[str, Converter]) -> DocumentMaker:
    return DocumentMaker(spec.text_fields, spec.id_field, spec.kept_fields, converters)


def _by_offset(record: Document | Rejected) -> Document | Rejected:
    if isinstance(record, Rejected):
        return record._replace(detail=f"{record.detail} (the position is a byte offset)")
    return record


def _match(pattern: str, output: str | None) -> Iterator[tuple[str, int]]:
    yield from match_files(pattern, output=output)


def _one_of_each(path: str, sizes: Iterable[int]) -> InputFile:
    return InputFile(path, max(sizes))


class _ReadPart(beam.DoFn):
    """Reads a part of a file, and counts what comes out of it."""

    def __init__(self, spec: ReadSpec):
        self._spec = spec

    def process(self, part: Part) -> Iterator[Any]:
        counts: Counter[str] = Counter()
        unreported = 0
        for record in read_part(part, self._spec):
            if isinstance(record, Rejected):
                counts[f"rejected_{record.reason}"] += 1
                yield beam.pvalue.TaggedOutput("rejected", record)
            else:
                counts["documents"] += 1
                yield record
            unreported += 1
            if unreported == _REPORT_EVERY:
                _report(counts)
                unreported = 0
        _report(counts)


def _report(counts: Counter[str]) -> None:
    """Adds counts to Beam's counters and to this process's tallies, and starts them anew."""
    progress.add("documents_read", counts.total())
    for name, count in counts.items():
        Metrics.counter("ReadDocuments", name).inc(count)
    counts.clear()

"""Which format a file has, and how text, JSON Lines and single documents become `Document`s."""

import json
import posixpath
from collections.abc import Iterable, Iterator
from typing import Any

from transforms.decompress import split_codec
from transforms.lines import BYTE_ORDER_MARK, Lines, LongLine
from transforms.records import DocumentMaker, UnusableRecord, rejected
from transforms.schema import Document, Rejected, content_hash, preview

FORMATS = ("text", "jsonl", "csv", "parquet", "file")
"""What a file can be read as."""

INPUT_FORMATS = ("auto", *FORMATS)
"""What can be asked for; under `auto` a file's extension decides."""

BLANK_LINE = "a blank line of a text file"
"""How the detail of such a rejected record begins: between paragraphs it is no loss."""

_FORMAT_OF_EXTENSION = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}


def file_format(path: str, input_format: str) -> str:
    """Returns one of `FORMATS` for a file.

    Args:
      path: the file's; under `auto` its extension decides, less that of a codec.
      input_format: one of `INPUT_FORMATS`.

    Raises:
      ValueError: the extension or the format is unknown, or a Parquet file is compressed as a whole.
    """
    if input_format not in INPUT_FORMATS:
        raise ValueError(f"the input format must be one of {', '.join(INPUT_FORMATS)}, not {input_format!r}")
    inner_path, codec = split_codec(path)
    extension = posixpath.splitext(inner_path)[1].lower()
    format_ = _FORMAT_OF_EXTENSION.get(extension) if input_format == "auto" else input_format
    if format_ is None:
        raise ValueError(
            f"the name of {path} does not tell its format: give --input_format "
            f"{'|'.join(FORMATS)}, or a glob without it (known are {' '.join(_FORMAT_OF_EXTENSION)})"
        )
    if format_ == "parquet" and codec:
        raise ValueError(f"{path} is compressed as a whole, which Parquet cannot be: decompress it first")
    return format_


def parse_json_object(line: bytes) -> dict[str, Any]:
    """Returns the JSON object in a line, as Python's `json` reads it: NaN is a number, the last of equal keys counts.

    Raises:
      UnusableRecord: it is not UTF-8, or not a JSON object.
    """
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UnusableRecord("invalid_utf8", str(error)) from error
    except ValueError as error:
        raise UnusableRecord("malformed_record", f"not JSON: {error}") from error
    except RecursionError as error:
        raise UnusableRecord("malformed_record", "JSON nested too deeply") from error
    if type(value) is not dict:
        raise UnusableRecord("malformed_record", f"JSON, but a {type(value).__name__} and not an object")
    return value


def read_text(lines: Lines, source: str) -> Iterator[Document | Rejected]:
    """Yields a document per line.

    Args:
      lines: with their positions.
      source: the file they are from.
    """
    for position, line in lines:
        if isinstance(line, LongLine):
            yield reject_long_line(line, source, position)
            continue
        document = whole_document(line, source, position)
        if isinstance(document, Rejected) and document.reason == "empty_text":
            document = document._replace(detail=BLANK_LINE)
        yield document


def read_jsonl(lines: Lines, source: str, make_document: DocumentMaker) -> Iterator[Document | Rejected]:
    """Yields a document per line that holds a JSON object; blank lines are no records.

    Args:
      lines: with their positions.
      source: the file they are from.
      make_document: for one object.
    """
    for position, line in lines:
        if isinstance(line, LongLine):
            yield reject_long_line(line, source, position)
        elif line and not line.isspace():
            try:
                yield make_document(parse_json_object(line), source, position)
            except UnusableRecord as error:
                yield rejected(source, position, error, line)


def read_whole(chunks: Iterable[bytes], source: str, max_bytes: int) -> Iterator[Document | Rejected]:
    """Yields the one document that a file is.

    Args:
      chunks: the file's bytes.
      source: the file.
      max_bytes: the longest document; of a longer one no more is read.
    """
    data = bytearray()
    for chunk in chunks:
        data += chunk
        if len(data) > max_bytes:
            yield Rejected(source, 0, "", "too_large", f"more than {max_bytes:,} bytes", preview(bytes(data[:1000])))
            return
    yield whole_document(bytes(data).removeprefix(BYTE_ORDER_MARK), source, 0)


def whole_document(data: bytes, source: str, position: int) -> Document | Rejected:
    """Returns the document that is all text, named by its hash."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return Rejected(source, position, "", "invalid_utf8", str(error), preview(data))
    if not text or text.isspace():
        return Rejected(source, position, "", "empty_text", "there is nothing but white space", "")
    return Document(content_hash(text), text, source, position, {}, True)


def reject_long_line(line: LongLine, source: str, position: int) -> Rejected:
    """Returns what is reported of a line over the limit."""
    return Rejected(source, position, "", "too_large", f"a line of {line.num_bytes:,} bytes", preview(line.start))

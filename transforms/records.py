"""Makes a document of one parsed record, or says why the record is unusable."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from transforms.fields import Converter
from transforms.schema import Document, Rejected, content_hash, preview


class UnusableRecord(Exception):
    """A record of which no document can be made.

    Attributes:
      reason: a key of `schema.REJECT_REASONS`.
      detail: what exactly is wrong, for a person.
      id: the record's id where it is known, else empty.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail
        self.id = ""


def rejected(source: str, position: int, error: UnusableRecord, record: str | bytes) -> Rejected:
    """Returns what is reported of an unusable record, with a preview of it."""
    return Rejected(source, position, error.id, error.reason, error.detail, preview(record))


class DocumentMaker:
    """Makes documents of records.

    Args:
      text_fields: what is embedded, joined by newlines; absent, null and empty ones are left out.
      id_field: what names the document; None where it is to be named by the hash of its text.
      kept_fields: what is copied, with the types it must fit.
      converters: what makes a value fit, by kept field.

    Attributes:
      string_fields: the fields of text and id.
      field_names: these and the kept fields.
    """

    def __init__(
        self,
        text_fields: Sequence[str],
        id_field: str | None,
        kept_fields: pa.Schema,
        converters: Mapping[str, Converter],
    ):
        self.string_fields = tuple(dict.fromkeys([*text_fields, *([id_field] if id_field else [])]))
        self.field_names = tuple(dict.fromkeys([*self.string_fields, *converters]))
        self._text_fields = tuple(text_fields)
        self._id_field = id_field
        self._kept_fields = kept_fields
        self._converters = converters

    def __call__(
        self, record: Mapping[str, Any], source: str, position: int, kept: Mapping[str, Any] | None = None
    ) -> Document:
        """Returns the record's document.

        Args:
          record: values by field, as JSON has them; text may also be bytes.
          source: the file it was read from.
          position: its place there.
          kept: values of the kept fields, where these are not in the record itself.

        Raises:
          UnusableRecord: there is no text or no id, or a value is not of its type.
        """
        kept = record if kept is None else kept
        id_ = self._id(record)
        try:
            text = self._text(record)
            fields = {name: self._kept(name, kept.get(name)) for name in self._converters}
        except UnusableRecord as error:
            error.id = id_
            raise
        if self._id_field is None:
            return Document(content_hash(text), text, source, position, fields, True)
        return Document(id_, text, source, position, fields, False)

    def _id(self, record: Mapping[str, Any]) -> str:
        name = self._id_field
        if name is None:
            return ""
        value = record.get(name)
        if type(value) is int:
            return str(value)
        if value is None or value in ("", b""):
            raise UnusableRecord("missing_id", f"field {name!r} is {'absent or null' if value is None else 'empty'}")
        return _string(value, name)

    def _text(self, record: Mapping[str, Any]) -> str:
        parts = [_string(value, name) for name in self._text_fields if (value := record.get(name)) is not None]
        if not parts:
            names = ", ".join(map(repr, self._text_fields))
            raise UnusableRecord("missing_text", f"field {names} absent or null")
        text = "\n".join(part for part in parts if part)
        if not text or text.isspace():
            raise UnusableRecord("empty_text", "there is nothing but white space")
        return text

    def _kept(self, name: str, value: Any) -> Any:
        try:
            return self._converters[name](value)
        except UnicodeError as error:
            raise UnusableRecord("invalid_utf8", f"field {name!r}: {error}") from error
        except (ValueError, OverflowError, RecursionError, pa.ArrowException) as error:
            type_ = self._kept_fields.field(name).type
            raise UnusableRecord("wrong_type", f"field {name!r}: {_shown(value)} is not {type_}") from error


def _string(value: Any, name: str) -> str:
    """Returns a value that must be a string which UTF-8 can write."""
    try:
        if type(value) is bytes:
            return value.decode("utf-8")
        if type(value) is str:
            if not value.isascii():
                value.encode("utf-8")  # JSON's escapes can make lone surrogates.
            return value
    except UnicodeError as error:
        raise UnusableRecord("invalid_utf8", f"field {name!r}: {error}") from error
    raise UnusableRecord("wrong_type", f"field {name!r}: {_shown(value)} is not a string")


def _shown(value: Any) -> str:
    """Returns a value for a person; of nested ones, which may be deep, only their type."""
    return f"a {type(value).__name__}" if isinstance(value, dict | list) else preview(repr(value))

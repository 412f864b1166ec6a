import pyarrow as pa
import pytest

from transforms.fields import json_converter
from transforms.records import DocumentMaker, UnusableRecord, rejected
from transforms.schema import REJECT_REASONS, Document, Rejected, content_hash


def maker(text_fields=("text",), id_field: str | None = "id", **kept) -> DocumentMaker:
    schema = pa.schema(list(kept.items()))
    return DocumentMaker(text_fields, id_field, schema, {field.name: json_converter(field.type) for field in schema})


def test_a_document_has_its_text_unchanged():
    text = "  two\r\nlines \u2028 ü\x00 "
    document = maker()({"id": "a", "text": text, "more": 1}, "file", 7)
    assert document == Document("a", text, "file", 7, {}, False)


def test_without_an_id_field_the_id_is_the_hash():
    document = maker(id_field=None)({"id": "a", "text": "t"}, "file", 7)
    assert document == Document(content_hash("t"), "t", "file", 7, {}, True)


@pytest.mark.parametrize(("value", "id_"), [("a", "a"), (" ", " "), (12, "12"), (-(10**30), f"-1{'0' * 30}"), (0, "0")])
def test_ids_are_strings_or_integers(value, id_):
    assert maker()({"id": value, "text": "t"}, "file", 1).id == id_


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"title": "a", "body": "b"}, "a\nb"),
        ({"title": "a"}, "a"),
        ({"title": None, "body": "b"}, "b"),
        ({"title": "", "body": "b"}, "b"),
        ({"title": " ", "body": "b"}, " \nb"),
    ],
)
def test_several_texts_are_joined_by_newlines(record, text):
    assert maker(["title", "body"])({"id": "a", **record}, "file", 1).text == text


def test_kept_fields_are_copied():
    make = maker(year=pa.int64(), tags=pa.list_(pa.string()))
    document = make({"id": "a", "text": "t", "year": 2000.0, "tags": None, "more": 1}, "file", 1)
    assert document.fields == {"year": 2000, "tags": None}
    assert make({"id": "a", "text": "t"}, "file", 1).fields == {"year": None, "tags": None}
    assert make({"id": "a", "text": "t", "year": 1}, "file", 1, {"year": 2}).fields == {"year": 2, "tags": None}


@pytest.mark.parametrize(
    ("record", "reason", "detail", "id_"),
    [
        ({"text": "t"}, "missing_id", "field 'id' is absent or null", ""),
        ({"id": None, "text": "t"}, "missing_id", "field 'id' is absent or null", ""),
        ({"id": "", "text": "t"}, "missing_id", "field 'id' is empty", ""),
        ({"id": 1.0, "text": "t"}, "wrong_type", "field 'id': 1.0 is not a string", ""),
        ({"id": True, "text": "t"}, "wrong_type", "field 'id': True is not a string", ""),
        ({"id": ["a"], "text": "t"}, "wrong_type", "field 'id': a list is not a string", ""),
        ({"id": "\ud800", "text": "t"}, "invalid_utf8", "field 'id': 'utf-8' codec can't encode", ""),
        ({"id": b"\xff", "text": "t"}, "invalid_utf8", "field 'id': 'utf-8' codec can't decode", ""),
        ({"id": "a"}, "missing_text", "field 'text' absent or null", "a"),
        ({"id": "a", "text": None}, "missing_text", "field 'text' absent or null", "a"),
        ({"id": "a", "text": ""}, "empty_text", "nothing but white space", "a"),
        ({"id": "a", "text": " \t\u3000\n"}, "empty_text", "nothing but white space", "a"),
        ({"id": "a", "text": 5}, "wrong_type", "field 'text': 5 is not a string", "a"),
        ({"id": "a", "text": {"x": 1}}, "wrong_type", "field 'text': a dict is not a string", "a"),
        ({"id": "a", "text": "x\ud800"}, "invalid_utf8", "field 'text': 'utf-8' codec can't encode", "a"),
        ({"id": "a", "text": b"x\xff"}, "invalid_utf8", "field 'text': 'utf-8' codec can't decode", "a"),
        ({"id": "a", "text": "t", "year": "z"}, "wrong_type", "field 'year': 'z' is not int64", "a"),
        ({"id": "a", "text": "t", "year": 10**30}, "wrong_type", "is not int64", "a"),
        ({"id": "a", "text": "t", "at": 1 << 80}, "wrong_type", "is not timestamp", "a"),
        ({"id": "a", "text": "t", "label": "\ud800"}, "invalid_utf8", "field 'label'", "a"),
    ],
)
def test_unusable_records_say_why(record, reason, detail, id_):
    make = maker(year=pa.int64(), at=pa.timestamp("us"), label=pa.string())
    with pytest.raises(UnusableRecord) as caught:
        make(record, "file", 1)
    assert (caught.value.reason, caught.value.id) == (reason, id_)
    assert reason in REJECT_REASONS
    assert detail in caught.value.detail


def test_values_nested_too_deeply_to_be_written_do_not_fit():
    value: list = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(UnusableRecord, match="field 'label': a list is not string"):
        maker(label=pa.string())({"id": "a", "text": "t", "label": value}, "file", 1)
    while value:  # Else Python would unwind it by recursion.
        value = value[0]


def test_rejected_records_can_be_written_as_utf8():
    error = UnusableRecord("invalid_utf8", "why")
    error.id = "a"
    assert rejected("file", 3, error, "\ud800 text") == Rejected("file", 3, "a", "invalid_utf8", "why", "? text")
    assert rejected("file", 3, error, b"\xff text").preview == "\ufffd text"

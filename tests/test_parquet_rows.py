import datetime
import decimal
import io
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from transforms.fields import column_type
from transforms.files import RawFile
from transforms.parquet_rows import CorruptParquetError, ParquetInput, RowGroups, check_columns, parquet_converters
from transforms.records import DocumentMaker
from transforms.schema import Document, Rejected, content_hash

NO_FIELDS = pa.schema([])
LIMIT = 1 << 20


def written(table: pa.Table, row_group_size: int = 1000, **options) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=row_group_size, **options)
    return file.getvalue()


def read(
    data: bytes,
    kept_fields: pa.Schema = NO_FIELDS,
    id_field: str | None = "id",
    text_fields=("text",),
    split_bytes: int = 1,
    max_bytes: int = LIMIT,
) -> list[Document | Rejected]:
    parquet = ParquetInput(RawFile(io.BytesIO(data), "f"))
    check_columns(parquet.schema, "f", text_fields, id_field, kept_fields)
    make = DocumentMaker(text_fields, id_field, kept_fields, parquet_converters(kept_fields))
    groups = parquet.plan_row_groups(split_bytes)
    return [record for some in groups for record in parquet.read(some, make, kept_fields, max_bytes)]


def table_of(num_rows: int, **columns) -> pa.Table:
    ids = [f"id{row}" for row in range(num_rows)]
    texts = [f"the text of row {row}" for row in range(num_rows)]
    return pa.table({"id": ids, "unused": [b"x" * 100] * num_rows, "text": texts, **columns})


def documents_of(rows: range) -> list[Document]:
    return [Document(f"id{row}", f"the text of row {row}", "f", row, {}, False) for row in rows]


@pytest.mark.parametrize("split_bytes", [1, 5000, 1 << 30])
@pytest.mark.parametrize("row_group_size", [1, 7, 300, 1000])
def test_every_row_is_a_document(row_group_size, split_bytes):
    data = written(table_of(1000), row_group_size)
    assert read(data, split_bytes=split_bytes) == documents_of(range(1000))


def test_row_groups_are_units_of_work_and_small_ones_go_together():
    parquet = ParquetInput(RawFile(io.BytesIO(written(table_of(1000), 300)), "f"))
    assert parquet.plan_row_groups(1) == [
        RowGroups(0, 1, 0),
        RowGroups(1, 2, 300),
        RowGroups(2, 3, 600),
        RowGroups(3, 4, 900),
    ]
    sizes = [parquet._parquet.metadata.row_group(index).total_byte_size for index in range(4)]
    assert parquet.plan_row_groups(sizes[0] + sizes[1]) == [RowGroups(0, 2, 0), RowGroups(2, 4, 600)]
    assert parquet.plan_row_groups(1 << 30) == [RowGroups(0, 4, 0)]


def test_a_file_without_rows_has_no_documents():
    assert read(written(table_of(0))) == []


def test_only_needed_columns_are_read():
    table = table_of(10)
    data = bytearray(written(table, write_page_checksum=True, compression="none", use_dictionary=False))
    data[data.index(b"x" * 100)] ^= 1
    assert read(bytes(data)) == documents_of(range(10))


def outcomes(records: list[Document | Rejected]) -> list[tuple[int, str, str]]:
    """Returns by record its position, its id, and its text or why it has none."""
    return [
        (record.position, record.id, record.text if isinstance(record, Document) else record.reason)
        for record in records
    ]


@pytest.mark.parametrize(
    "type_",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.dictionary(pa.int8(), pa.string()),
    ],
)
def test_texts_and_ids_may_be_any_sort_of_string(type_):
    ids = ["1", "2", "3", "4", None, ""]
    texts = ["zü", None, "", " ", "a", "b"]
    table = pa.table({"id": pa.array(ids).cast(type_), "text": pa.array(texts).cast(type_)})
    assert outcomes(read(written(table))) == [
        (0, "1", "zü"),
        (1, "2", "missing_text"),
        (2, "3", "empty_text"),
        (3, "4", "empty_text"),
        (4, "", "missing_id"),
        (5, "", "missing_id"),
    ]


@pytest.mark.parametrize("type_", [pa.string(), pa.large_string(), pa.binary(), pa.large_binary()])
def test_bytes_that_are_not_utf8_cost_their_row(type_):
    strings = [b"sound", b"\xff", b"\xed\xa0\x80", "zü".encode(), None]
    binary = pa.large_binary() if type_ in (pa.large_string(), pa.large_binary()) else pa.binary()
    damaged = pa.Array.from_buffers(type_, 5, pa.array(strings, binary).buffers())
    ids = pa.array(list("abcde"))
    assert outcomes(read(written(pa.table({"id": ids, "text": damaged})))) == [
        (0, "a", "sound"),
        (1, "b", "invalid_utf8"),
        (2, "c", "invalid_utf8"),
        (3, "d", "zü"),
        (4, "e", "missing_text"),
    ]
    assert outcomes(read(written(pa.table({"id": damaged, "text": ids})))) == [
        (0, "sound", "a"),
        (1, "", "invalid_utf8"),
        (2, "", "invalid_utf8"),
        (3, "zü", "d"),
        (4, "", "missing_id"),
    ]
    kept = pa.schema([("label", pa.string())])
    if not pa.types.is_binary(type_) and not pa.types.is_large_binary(type_):
        records = read(written(pa.table({"id": ids, "text": ids, "label": damaged})), kept)
        assert [r.fields["label"] if isinstance(r, Document) else r.reason for r in records] == [
            "sound",
            "invalid_utf8",
            "invalid_utf8",
            "zü",
            None,
        ]


@pytest.mark.parametrize("type_", [pa.int8(), pa.uint64(), pa.int64()])
def test_integer_ids_are_strings(type_):
    table = pa.table({"id": pa.array([1, 0, None], type_), "text": ["a", "b", "c"]})
    assert outcomes(read(written(table))) == [(0, "1", "a"), (1, "0", "b"), (2, "", "missing_id")]


def test_without_an_id_field_ids_are_hashes_and_the_column_is_not_needed():
    table = pa.table({"text": ["a", "b"]})
    assert read(written(table), id_field=None) == [
        Document(content_hash(text), text, "f", row, {}, True) for row, text in enumerate(["a", "b"])
    ]


def test_several_texts_are_joined_and_columns_may_have_dots():
    table = pa.table({"id": ["1", "2"], "a.title": ["t", None], "a": [1, 2], "body": ["b", "b"]})
    assert outcomes(read(written(table), text_fields=["a.title", "body"])) == [(0, "1", "t\nb"), (1, "2", "b")]


def test_a_text_over_the_limit_is_rejected():
    table = pa.table({"id": list("abc"), "text": ["x" * 10, "x" * 11, "ü" * 6]})
    records = read(written(table), max_bytes=10)
    assert outcomes(records) == [(0, "a", "x" * 10), (1, "b", "too_large"), (2, "c", "too_large")]
    assert [record.detail for record in records if isinstance(record, Rejected)] == [
        "a text of 11 bytes",
        "a text of 12 bytes",
    ]
    assert outcomes(read(written(table), id_field=None, max_bytes=10))[1] == (1, "", "too_large")


NANOSECONDS = 1_600_000_000_123_456_789


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, None, 3], pa.int8()),
        pa.array([1.5, None, float("inf")], pa.float32()),
        pa.array([1.5, None, 2.5], pa.float16()),
        pa.array([True, None, False]),
        pa.array(["a", None, "a"]).dictionary_encode(),
        pa.array([b"\xff", None, b""]),
        pa.array([NANOSECONDS, None, -(1 << 62)], pa.timestamp("ns", "Europe/Berlin")),
        pa.array([1 << 60, None, 0], pa.timestamp("us")),
        pa.array([datetime.date(1, 1, 1), None, datetime.date(9999, 1, 1)]),
        pa.array([1, None, 2], pa.time64("ns")),
        pa.array([1, None, 2], pa.duration("ns")),
        pa.array([decimal.Decimal("1.50"), None, decimal.Decimal("-0.01")], pa.decimal128(5, 2)),
        pa.array([[1, None], None, []], pa.list_(pa.int32())),
        # Arrow cannot read nulls in fixed-size lists.
        pa.array([[1.0, 2.0], [None, 5.0], [3.0, 4.0]], pa.list_(pa.float32(), 2)),
        pa.array([{"a": NANOSECONDS, "b": "x"}, None, {"a": None, "b": None}],
                 pa.struct([("a", pa.timestamp("ns")), ("b", pa.string())])),
        pa.array([[("k", NANOSECONDS)], None, []], pa.map_(pa.string(), pa.timestamp("ns"))),
        pa.array([uuid.UUID(int=1).bytes, None, uuid.UUID(int=2).bytes], pa.uuid()),
        pa.array([None, None, None], pa.int64()),
    ],
    ids=lambda column: str(column.type),
)  # fmt: skip
def test_kept_fields_come_out_as_they_went_in(column):
    table = pa.table({"id": list("abc"), "text": list("xyz"), "kept": column})
    type_ = column_type(column.type)
    documents = read(written(table), pa.schema([("kept", type_)]))
    values = pa.array([document.fields["kept"] for document in documents if isinstance(document, Document)], type_)
    expected = column.storage if isinstance(column, pa.ExtensionArray) else column
    assert values.equals(expected.cast(type_))
    assert pq.read_table(pa.BufferReader(written(pa.table({"kept": values})))).num_rows == 3
    assert len(values) == 3


def test_values_that_do_not_fit_the_type_kept_cost_their_row():
    table = pa.table({"id": list("abcd"), "text": list("wxyz"), "kept": pa.array([1.0, 2.5, None, 4.0])})
    records = read(written(table), pa.schema([("kept", pa.int64())]))
    assert outcomes(records) == [(0, "a", "w"), (1, "b", "wrong_type"), (2, "c", "y"), (3, "d", "z")]
    assert [record.fields["kept"] for record in records if isinstance(record, Document)] == [1, None, 4]
    assert isinstance(records[1], Rejected)
    assert records[1].detail == "field 'kept': 2.5 is not int64"


def test_numbers_that_would_become_infinite_cost_their_row():
    kept = pa.array([1e300, float("inf"), None, 1.5])
    records = read(
        written(pa.table({"id": list("abcd"), "text": list("wxyz"), "kept": kept})), pa.schema([("kept", pa.float32())])
    )
    assert [record.fields["kept"] for record in records if isinstance(record, Document)] == [float("inf"), None, 1.5]
    assert isinstance(records[0], Rejected)
    assert (records[0].reason, records[0].detail) == ("wrong_type", "field 'kept': 1e+300 is not float")


def test_values_that_python_has_no_object_for_can_be_shown():
    table = pa.table({"id": ["a"], "text": ["t"], "kept": pa.array([1 << 62], pa.timestamp("us"))})
    (rejected,) = read(written(table), pa.schema([("kept", pa.timestamp("ns"))]))
    assert isinstance(rejected, Rejected)
    assert rejected.detail == "field 'kept': <value out of range: 4611686018427387904> is not timestamp[ns]"


def test_a_field_may_be_text_and_id_and_kept_with_another_type():
    table = pa.table({"id": ["007", "8"], "text": ["t", "u"]})
    documents = read(written(table), pa.schema([("id", pa.int64()), ("text", pa.large_string())]))
    assert documents == [
        Document("007", "t", "f", 0, {"id": 7, "text": "t"}, False),
        Document("8", "u", "f", 1, {"id": 8, "text": "u"}, False),
    ]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"id": ["1"]}, "f has no column 'text'; its columns are 'id'"),
        ({"text": ["1"]}, "f has no column 'id'; its columns are 'text'"),
        ({"id": ["1"], "text": [1]}, "column 'text' of f is int64: text must be strings"),
        ({"id": ["1"], "text": [["1"]]}, "column 'text' of f is list<.*>: text must be strings"),
        ({"id": [1.0], "text": ["1"]}, "column 'id' of f is double: an id must be a string or an integer"),
        ({"id": ["1"], "text": ["1"]}, "f has no column 'kept'"),
        ({"id": ["1"], "text": ["1"], "kept": [[1]]}, "column 'kept' of f is list<.*>: it cannot be kept as int64"),
    ],
)
def test_columns_that_do_not_suit_are_errors_that_name_them(table, message):
    with pytest.raises(ValueError, match=message):
        read(written(pa.table(table)), pa.schema([("kept", pa.int64())]) if "kept" in message else NO_FIELDS)


def test_a_column_that_is_there_twice_is_an_error():
    table = pa.Table.from_arrays([pa.array(["1"])] * 3, ["id", "text", "text"])
    with pytest.raises(ValueError, match="f has 2 columns 'text'"):
        read(written(table))


@pytest.mark.parametrize("data", [b"", b"PAR1", b"no Parquet at all" * 10, written(table_of(100))[:-1]])
def test_a_footer_that_cannot_be_read_is_corrupt(data):
    with pytest.raises(CorruptParquetError):
        ParquetInput(RawFile(io.BytesIO(data), "f"))


def damaged_text(table: pa.Table, row: int, **options) -> bytes:
    """Returns a file in which one bit of a row's text is flipped."""
    data = bytearray(written(table, compression="none", use_dictionary=False, **options))
    data[data.index(f"row {row}".encode())] ^= 1
    return bytes(data)


def test_a_damaged_row_group_costs_its_own_rows():
    table = table_of(1000)
    damaged = damaged_text(table, 450, row_group_size=300, write_page_checksum=True)
    for split_bytes in (1, 1 << 30):
        records = read(damaged, split_bytes=split_bytes)
        (rejected,) = (record for record in records if isinstance(record, Rejected))
        assert (rejected.source, rejected.position, rejected.reason) == ("f", 300, "corrupt_file")
        assert rejected.detail.startswith("row group 1: 300 rows are lost, from row 300 of the file on: ")
        assert "CRC" in rejected.detail
        documents = [record for record in records if isinstance(record, Document)]
        assert documents == documents_of(range(300)) + documents_of(range(600, 1000))


def test_rows_before_the_damage_are_kept():
    table = table_of(20_000)
    damaged = damaged_text(table, 15_000, row_group_size=20_000, write_page_checksum=True, data_page_size=10_000)
    *documents, rejected = read(damaged)
    assert isinstance(rejected, Rejected)
    assert 10_000 < rejected.position <= 15_000
    assert documents == documents_of(range(rejected.position))
    assert f": {20_000 - rejected.position:,} rows are lost, from row {rejected.position} of" in rejected.detail


def test_a_dictionary_with_wrong_indices_is_damage():
    broken = pa.DictionaryArray.from_arrays(pa.array([0, 5], pa.int8()), pa.array(["a"]), safe=False)
    parquet = ParquetInput(RawFile(io.BytesIO(written(table_of(2))), "f"))
    batch = pa.record_batch({"id": pa.array(["1", "2"]), "text": broken})
    make = DocumentMaker(["text"], "id", NO_FIELDS, {})
    with pytest.raises(CorruptParquetError):
        list(parquet._read_batch(batch, 0, make, NO_FIELDS, LIMIT))


def test_every_flipped_bit_is_an_error_or_harmless_or_named():
    data = written(table_of(300), 100, write_page_checksum=True)
    expected = documents_of(range(300))
    for position in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        try:
            records = read(bytes(damaged))
        except (CorruptParquetError, ValueError):
            continue  # The footer: the file is rejected whole, or a column is missing.
        documents = [record for record in records if isinstance(record, Document)]
        if len(documents) == len(records) == 300:
            continue
        lost = [record for record in records if isinstance(record, Rejected)]
        assert {record.reason for record in lost} <= {"corrupt_file", "invalid_utf8"}, position
        assert all(document in expected for document in documents), position


def test_a_file_that_cannot_be_read_is_no_corrupt_file():
    class FailingFile(io.BytesIO):
        read_bytes_left = 1 << 30

        def read(self, num_bytes: int | None = -1, /) -> bytes:
            data = super().read(num_bytes)
            self.read_bytes_left -= len(data)
            if self.read_bytes_left < 0:
                raise ConnectionError("the network is gone")
            return data

    data = written(table_of(1000), 300)
    file = FailingFile(data)
    parquet = ParquetInput(RawFile(file, "gs://some/file"))
    file.read_bytes_left = 0
    make = DocumentMaker(["text"], "id", NO_FIELDS, {})
    with pytest.raises(OSError, match="cannot read gs://some/file: the network is gone"):
        list(parquet.read(RowGroups(0, 4, 0), make, NO_FIELDS, LIMIT))
    with pytest.raises(OSError, match="cannot read gs://some/file: the network is gone"):
        ParquetInput(RawFile(file, "gs://some/file"))


def test_large_rows_are_decoded_a_few_at_a_time(monkeypatch):
    batch_sizes = []
    iter_batches = pq.ParquetFile.iter_batches

    def record(self, batch_size, *arguments, **options):
        batch_sizes.append(batch_size)
        return iter_batches(self, batch_size, *arguments, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", record)
    texts = [f"{row}" * (4 << 20) for row in range(4)]
    table = pa.table({"id": list("abcd"), "text": texts})
    assert [record.text for record in read(written(table), max_bytes=1 << 30) if isinstance(record, Document)] == texts
    read(written(table_of(1000)))
    assert batch_sizes == [1, 256]

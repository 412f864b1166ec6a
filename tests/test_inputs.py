import gzip
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from transforms.inputs import InputPlan, plan_inputs

INT = pa.int64()


def write_jsonl(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def plan(*paths: Path | str, **arguments) -> InputPlan:
    return plan_inputs([str(path) for path in paths], **arguments)


def fields_of(plan: InputPlan) -> dict[str, pa.DataType]:
    return {field.name: field.type for field in plan.kept_fields}


def test_the_plan_of_a_json_lines_file(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"id": 1, "text": "t", "year": 1}, {"text": "t", "label": "x"})
    assert plan(path) == InputPlan((str(path),), "auto", ("text",), "id", pa.schema([]))
    assert plan(path, input_format="jsonl", text_fields=["label", "text"], id_field="year") == InputPlan(
        (str(path),), "jsonl", ("label", "text"), "year", pa.schema([])
    )


ONE_LINE = '[{"id": 1, "text": "t"}, {"id": 2, "text": "t"}]'
LINE_BY_LINE = '\n[ {"id": 1, "text": "t"},\n{"id": 2, "text": "t"},\n{"id": 3, "text": "t"}\n]\n'


@pytest.mark.parametrize(
    "array", [ONE_LINE, LINE_BY_LINE, json.dumps([{"text": "t"}] * 9, indent=2), "[]", "\ufeff[\n{}]"]
)
def test_a_json_array_is_refused_with_what_converts_it(tmp_path, array):
    path = tmp_path / "the records.json"
    path.write_text(array)
    with pytest.raises(
        ValueError, match=r"is one JSON array, .* `jq -c '\.\[\]' 'the records.json' > 'the records.jsonl'`$"
    ):
        plan(path)
    with gzip.open(tmp_path / "a.json.gz", "wt") as file:
        file.write(array)
    with pytest.raises(ValueError, match=r"a\.json\.gz is .*: decompress it and convert it .* a\.json > a\.jsonl`$"):
        plan(tmp_path / "a.json.gz")


@pytest.mark.parametrize(
    ("name", "read", "written"),
    [
        ("a.jsonl", "a.jsonl", "a.lines.jsonl"),
        ("a.JSONL", "a.JSONL", "a.lines.jsonl"),
        ("a.jsonl.gz", "a.jsonl", "a.lines.jsonl"),
        ("a.ndjson", "a.ndjson", "a.jsonl"),
    ],
)
def test_what_converts_a_json_array_never_writes_to_the_file_it_reads(tmp_path, name, read, written):
    data = ONE_LINE.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(ValueError, match=rf"`jq -c '\.\[\]' {re.escape(read)} > {re.escape(written)}`$"):
        plan(tmp_path / name)


@pytest.mark.parametrize("first", ['[{"x": 1}]', "[{}, {}]", "[]", '\ufeff\r\n[{"x": 1}]\r'])
def test_an_array_on_the_first_line_is_a_bad_record_where_one_other_is_good(tmp_path, first):
    path = tmp_path / "a.jsonl"
    path.write_text(first + '\n{"text": "t"}\n', newline="")
    assert plan(path).text_fields == ("text",)
    path.write_text(first + "\nno record\n", newline="")
    with pytest.raises(ValueError, match=r"a\.jsonl is one JSON array"):
        plan(path)


@pytest.mark.parametrize("first", ["[]", "[{}]", "[2026-11-22] begin of the log", '["an", "array"]', "["])
def test_a_first_line_that_is_no_object_is_a_bad_record_where_others_are(tmp_path, first):
    path = tmp_path / "a.json"
    path.write_text(first + '\n{"text": "t"}\n{"text": "u"}\n')
    assert plan(path).text_fields == ("text",)


def test_local_patterns_become_absolute(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", {"text": "t"})
    monkeypatch.chdir(tmp_path)
    assert plan("*.jsonl", "./").patterns == (f"{tmp_path}/*.jsonl", f"{tmp_path}/*")


def test_without_ids_in_the_records_the_hash_is_the_id(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "t"})
    assert plan(path).id_field is None
    with_ids = write_jsonl(tmp_path / "b.jsonl", {"id": "1", "text": "t"})
    assert plan(with_ids, id_field="").id_field is None
    with pytest.raises(ValueError, match=r"b\.jsonl has a field 'id' and .*a\.jsonl has none: read them in separate"):
        plan(path, with_ids)
    assert plan(path, with_ids, id_field="").id_field is None
    assert plan(path, with_ids, id_field="id").id_field == "id"


@pytest.mark.parametrize(
    ("values", "type_"),
    [
        ([1, None], INT),
        ([1, 2.5], pa.float64()),
        ([1, 1 << 63], pa.uint64()),
        (["a", "\ud800"], pa.string()),
        ([True], pa.bool_()),
        (["a", None], pa.string()),
        ([[1], []], pa.list_(INT)),
        ([{"a": 1}, {"b": "x"}], pa.struct([("a", INT), ("b", pa.string())])),
    ],
)
def test_types_of_kept_json_fields_are_inferred(tmp_path, values, type_):
    records = ({"text": "t", "kept": value} for value in values)
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "t"}, *records)
    assert fields_of(plan(path, keep_fields=["kept"])) == {"kept": type_}
    assert fields_of(plan(path, keep_fields=["kept:string"])) == {"kept": pa.string()}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([None], r"the first records do not tell the type of field 'kept' \(null\): give its type"),
        ([[]], r"do not tell the type of field 'kept' \(list<item: null>\): give its type"),
        (
            [1, "a"],
            r"field 'kept' of .*a\.jsonl has no one type, some values are int64, some are string: give its type",
        ),
        ([1 << 64], r"field 'kept' of .*a\.jsonl has no one type, some integers do not fit 64 bits: give its type"),
        ([1 << 63, -1], r"field 'kept' of .*a\.jsonl has no one type, -1 is not uint64, as others are: give its type"),
        (
            [2.5, (1 << 53) + 1],
            r"field 'kept' of .*a\.jsonl has no one type, 9007199254740993 is not double, as others are: give its type",
        ),
    ],
)
def test_kept_json_fields_without_one_type_need_one(tmp_path, values, message):
    path = write_jsonl(tmp_path / "a.jsonl", *({"text": "t", "kept": value} for value in values))
    with pytest.raises(ValueError, match=message + r" as in --keep_fields kept:int64, or kept:string for any values"):
        plan(path, keep_fields=["kept"])
    assert fields_of(plan(path, keep_fields=["kept:string"])) == {"kept": pa.string()}


def test_values_nested_too_deeply_need_a_type(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "t", "kept": ' + "[" * 900 + "]" * 900 + "}\n")
    with pytest.raises(ValueError, match=r"field 'kept' of .* has no one type, maximum recursion depth"):
        plan(tmp_path / "a.jsonl", keep_fields=["kept"])


def test_types_hold_the_values_of_all_files(tmp_path):
    pq.write_table(pa.table({"id": ["1"], "text": ["t"], "year": pa.array([1], pa.int16())}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"id": ["1"], "text": ["t"], "year": pa.array([1], pa.int32())}), tmp_path / "b.parquet")
    write_jsonl(tmp_path / "c.jsonl", {"id": "1", "text": "t", "year": None})
    assert fields_of(plan(tmp_path / "*.parquet", keep_fields=["year"])) == {"year": pa.int32()}
    assert fields_of(plan(tmp_path / "*", keep_fields=["year"])) == {"year": pa.int32()}
    write_jsonl(tmp_path / "c.jsonl", {"id": "1", "text": "t", "year": 1})
    assert fields_of(plan(tmp_path / "*", keep_fields=["year"])) == {"year": INT}
    (tmp_path / "d.csv").write_text("id,text,year\n1,t,1\n")
    with pytest.raises(ValueError, match=r"field 'year' of .* has no one type, some values are "):
        plan(tmp_path / "*", keep_fields=["year"])
    assert fields_of(plan(tmp_path / "*", keep_fields=["year:int64"])) == {"year": INT}


def test_types_of_parquet_columns_are_kept(tmp_path):
    table = pa.table({
        "text": ["t"],
        "id": [1],
        "at": pa.array([1], pa.timestamp("ns", "UTC")),
        "label": pa.array(["a"]).dictionary_encode(),
        "tags": pa.array([["a"]], pa.list_(pa.string())),
    })  # fmt: skip
    pq.write_table(table, tmp_path / "a.parquet")
    planned = plan(tmp_path / "a.parquet", keep_fields=["at", "label,tags"])
    assert fields_of(planned) == {
        "at": pa.timestamp("ns", "UTC"),
        "label": pa.string(),
        "tags": pa.list_(pa.field("element", pa.string())),
    }
    assert planned.id_field == "id"


def test_csv_columns_are_strings_unless_a_type_is_given(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("text\tyear\tlabel\nt\t1\tx\n")
    assert fields_of(plan(path, keep_fields=["year", "label"])) == {"year": pa.string(), "label": pa.string()}
    assert fields_of(plan(path, keep_fields=["year:int64"])) == {"year": INT}
    with pytest.raises(ValueError, match=r"column 'year' of .*a\.tsv: a CSV cell cannot be list<item: int64>"):
        plan(path, keep_fields=["year:list<int64>"])


def write_parquet(path: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def write_csv(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({}, "text"),
        ({"text_fields": ["body", "title"]}, "title"),
        ({"text_fields": ["body"], "id_field": "key"}, "key"),
        ({"text_fields": ["body"], "keep_fields": ["year"]}, "year"),
        ({"text_fields": ["body"], "keep_fields": ["year:int64"]}, "year"),
        ({"text_fields": ["body"], "keep_fields": ["year:int46"]}, "year:int46"),
        ({"text_fields": ["body"], "keep_fields": ["year:decimal"]}, "year:decimal"),
    ],
)
def test_fields_that_are_not_there_are_errors_that_name_what_is(tmp_path, arguments, name):
    jsonl = write_jsonl(tmp_path / "a.jsonl", {"id": "1"}, {"body": "b"})
    with pytest.raises(ValueError, match=rf"a\.jsonl has no field '{name}' in the first records; it has 'id', 'body'"):
        plan(jsonl, **arguments)
    csv = write_csv(tmp_path / "a.csv", "id,body\n1,b\n")
    with pytest.raises(ValueError, match=rf"a\.csv has no column '{name}'; it has 'id', 'body'"):
        plan(csv, **arguments)
    parquet = write_parquet(tmp_path / "a.parquet", id=["1"], body=["b"])
    with pytest.raises(ValueError, match=rf"a\.parquet has no column '{name}'; it has 'id', 'body'"):
        plan(parquet, **arguments)


def test_a_type_that_there_is_not_is_told_with_those_that_there_are(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "t", "price": "1.25"})
    told = r"no field 'price:decimal128' in .*, and types after a colon such as string, int64, .*decimal128\(10,2\), "
    with pytest.raises(ValueError, match=told):
        plan(path, keep_fields=["price:decimal128"])
    assert fields_of(plan(path, keep_fields=["price:decimal128(5,2)"])) == {"price": pa.decimal128(5, 2)}


def test_a_json_field_may_be_in_some_records_and_a_column_must_be_in_all_files(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", {"id": "1", "text": "t"})
    write_jsonl(tmp_path / "b.jsonl", {"id": "1", "text": "t", "year": 1})
    assert fields_of(plan(tmp_path / "*.jsonl", keep_fields=["year"])) == {"year": INT}
    write_csv(tmp_path / "c.csv", "id,text\n1,t\n")
    with pytest.raises(ValueError, match=r"c\.csv has no column 'year'"):
        plan(tmp_path / "*", keep_fields=["year"])


def test_columns_of_wrong_types_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"column 'text' of .*a\.parquet is int64: text must be strings"):
        plan(write_parquet(tmp_path / "a.parquet", text=[1]))
    with pytest.raises(ValueError, match=r"column 'id' of .*b\.parquet is double: an id must be"):
        plan(write_parquet(tmp_path / "b.parquet", text=["t"], id=[1.0]))
    with pytest.raises(ValueError, match=r"column 'x' of .*c\.parquet is list.*: it cannot be kept as int64"):
        plan(write_parquet(tmp_path / "c.parquet", text=["t"], x=[[1]]), keep_fields=["x:int64"])
    with pytest.raises(ValueError, match=r"d\.csv has 2 columns 'text': rename all but one"):
        plan(write_csv(tmp_path / "d.csv", "text,text\na,b\n"))


@pytest.mark.parametrize("format_", ["text", "file"])
def test_files_without_fields_take_no_options_for_fields(tmp_path, format_):
    path = write_csv(tmp_path / "a.txt", "one\n")
    assert plan(path, input_format=format_).id_field is None
    assert plan(path, input_format=format_, id_field="").id_field is None
    for option, arguments in (
        ("--id_field", {"id_field": "id"}),
        ("--keep_fields", {"keep_fields": ["year:int64"]}),
        ("--text_field", {"text_fields": ["text"]}),
    ):
        message = rf"{option} needs fields, and .*a\.txt has none, read as {format_}: leave it out"
        with pytest.raises(ValueError, match=message):
            plan(path, input_format=format_, **arguments)


def test_files_with_and_without_fields_may_be_mixed(tmp_path):
    write_csv(tmp_path / "a.txt", "one\n")
    write_jsonl(tmp_path / "b.jsonl", {"id": "1", "body": "t"})
    planned = plan(tmp_path / "*", text_fields=["body"])
    assert (planned.text_fields, planned.id_field) == (("body",), "id")


def test_formats_and_globs_that_cannot_be_are_errors(tmp_path):
    write_csv(tmp_path / "a.md", "one\n")
    with pytest.raises(ValueError, match=r"the name of .*a\.md does not tell its format: give --input_format"):
        plan(tmp_path / "*")
    with pytest.raises(ValueError, match="must be one of auto, text, jsonl, csv, parquet, file, not 'xml'"):
        plan(tmp_path / "*", input_format="xml")
    with pytest.raises(FileNotFoundError, match=r"no file matches .*/\*\.jsonl"):
        plan(tmp_path / "*", tmp_path / "*.jsonl", input_format="text")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet"])
def test_a_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path, name, monkeypatch):
    (tmp_path / name).write_text("x")

    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("apache_beam.io.filesystems.FileSystems.open", refuse)
    with pytest.raises(OSError, match=rf"cannot open .*{name}: .*Permission denied"):
        plan(tmp_path / name)


def test_what_cannot_be_decoded_says_nothing_and_is_no_error(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no Parquet")
    (tmp_path / "b.jsonl").write_bytes(b"no JSON\n\xff\n[1]\n" + b"x" * (5 << 20))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "t"}\n' * 100)[:5])
    (tmp_path / "d.csv").write_bytes(b"")
    (tmp_path / "e.csv").write_bytes(b"\xff\n")
    assert plan(tmp_path / "*").id_field is None
    with pytest.raises(ValueError, match="the first records do not tell the type of field 'year'"):
        plan(tmp_path / "*", keep_fields=["year"])
    write_parquet(tmp_path / "f.parquet", text=["t"], id=["1"], year=[1])
    planned = plan(tmp_path / "*", keep_fields=["year"])
    assert (planned.id_field, fields_of(planned)) == ("id", {"year": INT})


def test_compressed_files_are_looked_into_also_where_cut(tmp_path):
    lines = b'{"id": "1", "text": "t", "year": 1}\n' * 1000
    compressed = gzip.compress(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(compressed[:-10])
    planned = plan(tmp_path / "a.jsonl.gz", keep_fields=["year"])
    assert (planned.id_field, fields_of(planned)) == ("id", {"year": INT})


def test_little_is_read_of_many_large_files(tmp_path, monkeypatch):
    line = json.dumps({"text": "t" * 1000}) + "\n"
    for number in range(20):
        (tmp_path / f"{number:02}.jsonl").write_text(line * 1200)
    (tmp_path / "00.jsonl").write_text("")
    (tmp_path / "10.jsonl").write_text(line * 1200 + json.dumps({"id": "too late to be seen", "text": "t"}) + "\n")
    opened = []

    def record(path):
        opened.append(path)
        return open_file(path)

    from transforms.inputs import open_file

    monkeypatch.setattr("transforms.inputs.open_file", record)
    assert plan(tmp_path / "*").id_field is None
    assert opened == [f"{tmp_path}/{number:02}.jsonl" for number in (1, 10, 19)]

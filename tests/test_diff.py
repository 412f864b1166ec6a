"""What differs between two snapshots, against a comparison in memory."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from snapshot_helper import embedding, publish_rows, unit_vector

from transforms import id_partitions
from transforms.diff import CATEGORIES, NUM_EXAMPLES, diff
from transforms.id_partitions import IdPartitions, partition_count
from transforms.shards import DamagedSnapshotError

pytest_plugins = ["gcs_emulator"]

VECTOR = unit_vector(0)
FIELDS = pa.schema([("lang", pa.string()), ("stars", pa.float64())])

ids = st.text(max_size=3) | st.integers(0, 20).map(str)
fields = st.fixed_dictionaries(
    {
        "lang": st.none() | st.sampled_from(["en", "de", ""]),
        "stars": st.none() | st.sampled_from([0.0, 1.5, float("nan")]),
    }
)
corpora = st.dictionaries(
    ids.filter(lambda text: text.isprintable()),
    st.tuples(st.sampled_from("abc"), st.sampled_from("xy"), fields),
    max_size=25,
)


def publish_corpus(output, corpus):
    rows = [embedding(row_id, text, encoder, VECTOR, **kept) for row_id, (text, encoder, kept) in corpus.items()]
    return publish_rows(output, rows, FIELDS)


def expected_categories(before, after):
    found = {category: [] for category in CATEGORIES}
    for row_id in before.keys() | after.keys():
        if row_id not in before:
            category = "added"
        elif row_id not in after:
            category = "deleted"
        else:
            (old_text, old_encoder, old_fields), (text, encoder, kept) = before[row_id], after[row_id]
            if text != old_text:
                category = "changed"
            elif encoder != old_encoder:
                category = "re_encoded"
            else:
                category = (
                    "unchanged" if repr(sorted(kept.items())) == repr(sorted(old_fields.items())) else "fields_changed"
                )
        found[category].append(row_id)
    return found


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=corpora, after=corpora, rows_per_partition=st.sampled_from([1, 5, 100]))
def test_every_id_is_in_its_category(tmp_path_factory, monkeypatch, before, after, rows_per_partition):
    monkeypatch.setattr(id_partitions, "ROWS_PER_PARTITION", rows_per_partition)
    output = str(tmp_path_factory.mktemp("diff"))
    found = diff(publish_corpus(output, before), publish_corpus(output, after))
    expected = expected_categories(before, after)
    assert found.counts == {category: len(members) for category, members in expected.items()}
    assert found.examples == {
        category: sorted(members)[:NUM_EXAMPLES] for category, members in expected.items() if category != "unchanged"
    }


def test_a_snapshot_does_not_differ_from_itself(gcs_bucket):
    snapshot = publish_corpus(gcs_bucket, {"a": ("text", "x", {"lang": "en", "stars": None})})
    found = diff(snapshot, snapshot)
    assert found.counts == dict.fromkeys(CATEGORIES, 0) | {"unchanged": 1}


def test_other_columns_are_other_fields_but_their_order_is_not(tmp_path):
    rows = [embedding("a", lang="en", stars=1.0), embedding("b", lang=None, stars=None)]
    one = publish_rows(str(tmp_path), rows, FIELDS)
    swapped = publish_rows(str(tmp_path), rows, pa.schema([FIELDS.field("stars"), FIELDS.field("lang")]))
    fewer = publish_rows(str(tmp_path), rows, pa.schema([FIELDS.field("lang")]))
    assert diff(one, swapped).counts["unchanged"] == 2
    assert diff(one, fewer).counts["fields_changed"] == 2


def test_dates_and_times_that_python_has_not_are_compared(tmp_path):
    kept = pa.schema(
        [
            ("day", pa.date32()),
            ("seen", pa.timestamp("us")),
            ("fine", pa.timestamp("ns")),
            ("there", pa.timestamp("us", tz="Nowhere/Land")),
            ("took", pa.duration("ns")),
            ("all", pa.list_(pa.timestamp("ns"))),
            ("part", pa.struct([("day", pa.date32())])),
        ]
    )
    far, one = 9_000_000, 253_402_300_800_000_001  # Years 26611 and 10000.
    old = {"day": far, "seen": one, "fine": 1, "there": 1, "took": 1, "all": [1, None], "part": {"day": far}}
    rows = [embedding("same", **old), embedding("none", **dict.fromkeys(old))]
    before = publish_rows(str(tmp_path), rows + [embedding(name, **old) for name in old], kept)
    new = {"day": far + 1, "seen": one + 1, "fine": 2, "there": 2, "took": 2, "all": [1, 1], "part": {"day": far + 1}}
    after = publish_rows(str(tmp_path), rows + [embedding(name, **old | {name: new[name]}) for name in old], kept)
    found = diff(before, after)
    assert found.counts == dict.fromkeys(CATEGORIES, 0) | {"unchanged": 2, "fields_changed": 7}
    assert found.examples["fields_changed"] == sorted(old)


def test_a_date_is_another_field_than_its_number(tmp_path):
    days = publish_rows(str(tmp_path), [embedding("a", day=5)], pa.schema([("day", pa.date32())]))
    numbers = publish_rows(str(tmp_path), [embedding("a", day=5)], pa.schema([("day", pa.int32())]))
    assert diff(days, numbers).counts["fields_changed"] == 1


def test_an_id_that_is_there_twice_is_named(tmp_path):
    whole = publish_rows(str(tmp_path), [embedding("a")])
    twice = publish_rows(str(tmp_path), [embedding("a"), embedding("b"), embedding("a", "another text")])
    with pytest.raises(DamagedSnapshotError, match="holds two rows of id 'a'"):
        diff(whole, twice)


def test_partitions_hold_every_row_once_and_keep_ids_together(tmp_path):
    schema = pa.schema([("id", pa.string()), ("number", pa.int64())])
    batch = pa.record_batch([[f"id {i % 40}" for i in range(1000)], range(1000)], schema=schema)
    with IdPartitions(tmp_path, schema, 7) as partitions:
        for start in range(0, 1000, 300):
            partitions.add(batch.slice(start, 300))
        partitions.add(batch.slice(0, 0))
    tables = [partitions.read(partition) for partition in range(7)]
    together = pa.concat_tables(tables).sort_by("number")
    assert together.equals(pa.Table.from_batches([batch]).combine_chunks()) or together.to_pylist() == batch.to_pylist()
    seen = [set(table.column("id").to_pylist()) for table in tables]
    assert sum(map(len, seen)) == 40
    assert all(np.diff(table.column("number").to_numpy()).min(initial=1) > 0 for table in tables)


def test_more_rows_are_spread_over_more_partitions_up_to_a_limit():
    assert [partition_count(rows) for rows in (0, 199_999, 200_000, 1_000_000, 10**9)] == [1, 1, 2, 6, 64]

"""Vectors that survive the run that computed them, and vectors read back from the last snapshot."""

import os
import pickle
import threading
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.test_pipeline import TestPipeline as Pipeline
from apache_beam.testing.util import assert_that, equal_to
from snapshot_helper import FINGERPRINT, NO_FIELDS, embedding, parquet_bytes, table, unit_vector

from transforms import known_vectors, storage
from transforms.incremental import PREVIOUS, unpack
from transforms.known_vectors import ReadKnownVectors, WorkSaver, find_work, flush_work, read_work, write_work
from transforms.schema import EMBEDDING_DIM, content_hash
from transforms.shards import DamagedSnapshotError, Shard, read_shard
from transforms.snapshots import work_folder

pytest_plugins = ["gcs_emulator"]


def encoded(text: str, num_tokens: int = 2, truncated: bool = False) -> SimpleNamespace:
    vector = unit_vector(int(content_hash(text)[:8], 16))
    return SimpleNamespace(
        content_hash=content_hash(text),
        vector=vector,
        num_tokens=num_tokens,
        truncated=truncated,
        window_tokens=num_tokens + 2,
        encode_seconds=0.5,
    )


TEXTS = [encoded(f"text {number}", number, number % 2 == 0) for number in range(4)]


def rows_of(work: pa.Table | None) -> list[tuple[str, bytes, int, bool]] | None:
    """What saved work says, vectors as bytes; None where it is not whole."""
    if work is None:
        return None
    columns = [work[name].to_pylist() for name in ("content_hash", "embedding", "num_tokens", "truncated")]
    return [(text, np.float32(vector).tobytes(), *rest) for text, vector, *rest in zip(*columns, strict=True)]


def expected_rows(texts: list[SimpleNamespace]) -> list[tuple[str, bytes, int, bool]]:
    return [(one.content_hash, one.vector.tobytes(), one.num_tokens, one.truncated) for one in texts]


# Saved work.


@pytest.fixture(params=["local", "gs"])
def folder(request, tmp_path) -> str:
    if request.param == "local":
        return f"{tmp_path}/output/.work/run=1"
    return request.getfixturevalue("gcs_bucket") + "/output/.work/run=1"


def test_work_is_read_back_bit_for_bit(folder):
    path = write_work(folder, FINGERPRINT, TEXTS)
    assert path.startswith(f"{folder}/vectors-")
    assert rows_of(read_work(path, FINGERPRINT)) == expected_rows(TEXTS)


def test_each_batch_of_work_is_a_file_of_its_own(folder):
    paths = [write_work(folder, FINGERPRINT, TEXTS[:1]) for _ in range(3)]
    assert len(set(paths)) == 3
    assert sorted(known_vectors._ListWork().process(folder)) == sorted(paths)


def test_work_of_another_encoder_is_not_taken(folder):
    assert read_work(write_work(folder, FINGERPRINT, TEXTS), "0" * 64) is None


def test_work_that_vanished_is_not_taken(folder):
    assert read_work(f"{folder}/vectors-gone.parquet", FINGERPRINT) is None


def test_work_that_cannot_be_read_is_an_error(tmp_path):
    """Not to be confused with work that is torn: a storage that fails must not cost hours in silence."""
    with pytest.raises(IsADirectoryError):
        read_work(str(tmp_path), FINGERPRINT)


def test_work_torn_at_any_byte_is_not_taken(tmp_path):
    path = write_work(str(tmp_path), FINGERPRINT, TEXTS[:1])
    assert rows_of(read_work(path, FINGERPRINT)) == expected_rows(TEXTS[:1])
    for size in range(os.path.getsize(path) - 1, -1, -1):
        os.truncate(path, size)
        assert read_work(path, FINGERPRINT) is None, size


def test_work_with_any_byte_changed_is_right_or_not_taken(tmp_path):
    path = Path(write_work(str(tmp_path), FINGERPRINT, TEXTS[:1]))
    data = path.read_bytes()
    right = expected_rows(TEXTS[:1])
    taken = 0
    with path.open("r+b", buffering=0) as file:
        for place in range(len(data)):
            os.pwrite(file.fileno(), bytes([data[place] ^ 0xFF]), place)
            rows = rows_of(read_work(str(path), FINGERPRINT))
            assert rows in (None, right), place
            taken += rows is not None
            os.pwrite(file.fileno(), data[place : place + 1], place)
    assert path.read_bytes() == data
    assert taken < len(data) / 4  # Bytes that say nothing about the rows: statistics, and the writer's name.


@pytest.mark.parametrize(
    "contents",
    [
        pa.table({"content_hash": ["a"]}),
        table([embedding("a")]),  # A shard of a snapshot.
    ],
)
def test_a_file_of_another_schema_is_not_taken(tmp_path, contents):
    path = str(tmp_path / "vectors-1.parquet")
    pq.write_table(contents.replace_schema_metadata({"encoder": FINGERPRINT}), path)
    assert read_work(path, FINGERPRINT) is None


# Finding it.


def test_work_is_found_by_its_encoder_and_that_of_others_is_kept_for_a_while(folder):
    output = folder.removesuffix("/.work/run=1")
    now = datetime(2026, 11, 22, 18, tzinfo=timezone.utc)
    runs = {
        "20261101T000000Z": FINGERPRINT,
        "20261115T175959Z": "0" * 64,
        "20261115T180000Z": "0" * 64,
        "20261122T000000Z": FINGERPRINT,
    }
    for name, encoder in runs.items():
        write_work(work_folder(output, name), encoder, TEXTS)
    found = find_work(output, FINGERPRINT, now)
    assert found.usable == ["20261101T000000Z", "20261122T000000Z"]
    assert found.outdated == ["20261115T175959Z"]
    assert found.seconds_per_token == pytest.approx(4 * 0.5 / (0 + 1 + 2 + 3 + 4 * 2))


def test_work_that_does_not_say_of_which_encoder_it_is_counts_as_usable(tmp_path):
    """Torn, or of a run that is about to save its first."""
    torn, half_torn, empty, plain = (work_folder(str(tmp_path), f"2026110{day}T000000Z") for day in range(1, 5))
    for place in (torn, half_torn):
        path = Path(write_work(place, "0" * 64, TEXTS))
        path.rename(Path(place, "vectors-0.parquet"))
        os.truncate(f"{place}/vectors-0.parquet", 100)
    write_work(half_torn, "0" * 64, TEXTS)
    Path(empty).mkdir()
    Path(plain).mkdir()
    pq.write_table(pa.table({"content_hash": ["a"]}), f"{plain}/vectors-1.parquet")
    found = find_work(str(tmp_path), FINGERPRINT, datetime(2026, 11, 2, tzinfo=timezone.utc))
    assert found == (["20261101T000000Z", "20261103T000000Z", "20261104T000000Z"], [], None)


# When work is saved.


@pytest.fixture(autouse=True)
def no_clock():
    """In place of the one that all tests share: here the times are those of the program."""


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(known_vectors, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def saved(folder: Path) -> list[str]:
    """The hashes of all that was saved, file by file, each file's joined."""
    files = [rows_of(read_work(str(path), FINGERPRINT)) or [] for path in folder.glob("vectors-*")]
    return sorted(" ".join(text_hash for text_hash, *_ in rows) for rows in files)


def joined(*texts: SimpleNamespace) -> str:
    return " ".join(one.content_hash for one in texts)


def test_work_is_saved_after_a_while_all_that_waits_in_one_file(tmp_path, clock):
    saver = WorkSaver(str(tmp_path), FINGERPRINT)
    saver(TEXTS[:1])
    clock.seconds += 1.9
    saver(TEXTS[1:3])
    assert saved(tmp_path) == []
    clock.seconds += 0.1
    saver(TEXTS[3:])
    assert saved(tmp_path) == [joined(*TEXTS)]
    clock.seconds += 1.9
    saver(TEXTS[:1])
    assert saved(tmp_path) == [joined(*TEXTS)]


@pytest.mark.parametrize(
    ("running_seconds", "interval_seconds"),
    [(0.0, 2.0), (40.0, 2.0), (400.0, 20.0), (1200.0, 60.0), (36_000.0, 60.0)],
)
def test_a_crash_costs_a_twentieth_of_the_time_and_at_most_a_minute(tmp_path, clock, running_seconds, interval_seconds):
    saver = WorkSaver(str(tmp_path), FINGERPRINT)
    clock.seconds += running_seconds
    saver(TEXTS[:1])
    before = len(saved(tmp_path))
    clock.seconds += interval_seconds - 1.1 * 0.05 * interval_seconds
    saver(TEXTS[1:2])
    assert len(saved(tmp_path)) == before
    clock.seconds += 0.2 * interval_seconds
    saver(TEXTS[2:3])
    assert len(saved(tmp_path)) == before + 1


def test_work_is_saved_when_much_waits(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(known_vectors, "MAX_WORK_TEXTS", 3)
    saver = WorkSaver(str(tmp_path), FINGERPRINT)
    saver(TEXTS[:2])
    assert saved(tmp_path) == []
    saver(TEXTS[2:])
    assert saved(tmp_path) == [joined(*TEXTS)]
    saver(TEXTS[:1])
    assert saved(tmp_path) == [joined(*TEXTS)]


def test_nothing_to_save_makes_no_file(tmp_path, clock):
    saver = WorkSaver(str(tmp_path), FINGERPRINT)
    clock.seconds += 100
    saver([])
    assert list(tmp_path.iterdir()) == []


def test_a_saver_in_another_process_starts_anew(tmp_path, clock):
    saver = WorkSaver(str(tmp_path), FINGERPRINT)
    saver(TEXTS[:2])
    clock.seconds += 5
    copy = pickle.loads(pickle.dumps(saver))
    copy(TEXTS[2:])
    assert saved(tmp_path) == []
    saver([])
    assert saved(tmp_path) == [joined(*TEXTS[:2])]
    clock.seconds += 2
    copy([])
    assert saved(tmp_path) == sorted([joined(*TEXTS[:2]), joined(*TEXTS[2:])])


def test_what_waits_is_saved_when_it_is_asked_for(tmp_path, clock):
    saver = pickle.loads(pickle.dumps(WorkSaver(str(tmp_path), FINGERPRINT)))
    saver(TEXTS[:2])
    flush_work(str(tmp_path), "0" * 64)  # Of which nothing waits in this process.
    assert saved(tmp_path) == []
    flush_work(str(tmp_path), FINGERPRINT)
    assert saved(tmp_path) == [joined(*TEXTS[:2])]
    flush_work(str(tmp_path), FINGERPRINT)
    saver(TEXTS[2:])
    assert saved(tmp_path) == [joined(*TEXTS[:2])]
    flush_work(str(tmp_path), FINGERPRINT)
    assert saved(tmp_path) == sorted([joined(*TEXTS[:2]), joined(*TEXTS[2:])])


def test_saving_what_waits_waits_for_another_thread_that_saves(tmp_path, monkeypatch):
    monkeypatch.setattr(known_vectors, "MAX_WORK_TEXTS", 1)
    saver = WorkSaver(str(tmp_path), FINGERPRINT)
    is_writing, may_end = threading.Event(), threading.Event()

    def write_slowly(*arguments):
        is_writing.set()
        assert may_end.wait(60)
        return write_work(*arguments)

    monkeypatch.setattr(known_vectors, "write_work", write_slowly)
    threads = [threading.Thread(target=saver, args=[TEXTS]), threading.Thread(target=saver.flush)]
    threads[0].start()
    assert is_writing.wait(60)
    threads[1].start()
    threads[1].join(0.1)
    assert threads[1].is_alive()
    may_end.set()
    threads[1].join()
    assert saved(tmp_path) == [joined(*TEXTS)]
    threads[0].join()


def test_a_saver_whose_disk_is_full_goes_on_saving(tmp_path, monkeypatch, clock):
    saver = WorkSaver(str(tmp_path), FINGERPRINT)
    saver(TEXTS[:1])
    with monkeypatch.context() as patch:
        patch.setattr(known_vectors, "write_work", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space left"):
            saver.flush()
    saver(TEXTS[1:])
    saver.flush()
    assert saved(tmp_path) == [joined(*TEXTS[1:])]


def test_threads_lose_nothing_but_what_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(known_vectors, "MAX_WORK_TEXTS", 7)
    saver = WorkSaver(str(tmp_path), FINGERPRINT)
    texts = [[encoded(f"thread {thread} text {number}") for number in range(25)] for thread in range(4)]

    def save(mine):
        for one in mine:
            saver([one])

    threads = [threading.Thread(target=save, args=[mine]) for mine in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hashes = [text_hash for file in saved(tmp_path) for text_hash in file.split()]
    waiting = [one.content_hash for one in saver._waiting]
    assert sorted(hashes + waiting) == sorted(one.content_hash for mine in texts for one in mine)
    assert len(waiting) < 7


# Reading.

# "same" is the text of three rows, two of them in one shard.
SHARDS = [
    [embedding("a", "one"), embedding("b", "same"), embedding("c", "same")],
    [embedding("d", "same"), embedding("e", "two")._replace(truncated=True, num_tokens=77)],
]


@pytest.fixture
def shard_paths(tmp_path) -> list[str]:
    paths = [tmp_path / f"embeddings-0000{number}-of-00002.parquet" for number in range(2)]
    for path, rows in zip(paths, SHARDS, strict=True):
        path.write_bytes(parquet_bytes(table(rows)))
    return [str(path) for path in paths]


def as_shards(paths: list[str]) -> list[Shard]:
    """Returns shards as a manifest that fits them has them."""
    return [Shard(path, len(rows), storage.checksum(path)) for path, rows in zip(paths, SHARDS, strict=False)]


def describe(known) -> tuple:
    text_hash, packed = known
    return text_hash, *unpack(packed)


def read(shard_paths, same_encoder=True, work_folders=(), ids=(), vectors=()):
    """Reads what earlier runs left, and compares it with ids and with what `describe` returns."""
    with Pipeline(options=PipelineOptions(["--runner=FnApiRunner"])) as pipeline:
        found_ids, known = pipeline | ReadKnownVectors(as_shards(shard_paths), same_encoder, work_folders, FINGERPRINT)
        assert_that(found_ids, equal_to([(id_, PREVIOUS) for id_ in ids]), label="ids")
        assert_that(known | beam.Map(describe), equal_to(list(vectors)), label="vectors")


def test_the_last_snapshot_and_unfinished_runs_are_read(tmp_path, shard_paths):
    folders = [f"{tmp_path}/run={number}" for number in range(3)]
    for folder, texts in zip(folders, [TEXTS[:3], TEXTS[2:], TEXTS[:1]], strict=True):
        path = Path(write_work(folder, FINGERPRINT, texts))
    path.write_bytes(path.read_bytes()[:-1])
    write_work(folders[0], "0" * 64, TEXTS)
    Path(folders[1], "other.txt").write_text("not work")
    once_a_shard = [SHARDS[0][0], SHARDS[0][1], *SHARDS[1]]
    read(
        shard_paths,
        work_folders=[*folders, f"{tmp_path}/run=gone"],
        ids="abcde",
        vectors=[
            *[
                (row.content_hash, row.embedding.tobytes(), FINGERPRINT, row.num_tokens, row.truncated, "reused")
                for row in once_a_shard
            ],
            *[
                (text_hash, vector, FINGERPRINT, num_tokens, truncated, "recovered")
                for text_hash, vector, num_tokens, truncated in expected_rows([*TEXTS[:3], *TEXTS[2:]])
            ],
        ],
    )


def test_of_another_encoders_snapshot_only_the_ids_are_read(shard_paths):
    read(shard_paths, same_encoder=False, ids="abcde")


def test_where_there_is_nothing_nothing_is_read():
    read([])


# A damaged snapshot.


def damaged_by(path: str, damage) -> str:
    """Returns the message with which reading the known vectors of a shard fails, once `damage` has rewritten it."""
    contents = damage(pq.read_table(path))
    Path(path).write_bytes(contents if isinstance(contents, bytes) else parquet_bytes(contents))
    with pytest.raises(DamagedSnapshotError) as caught:
        list(known_vectors._ReadShard(FINGERPRINT).process(as_shards([path])[0]))
    message = str(caught.value)
    assert message.startswith(f"{path} ")
    assert message.endswith("Restore the file, or run embed with --full, which encodes everything anew without it")
    return message.removeprefix(f"{path} ").partition(": the snapshot is damaged.")[0]


@pytest.mark.parametrize("column", ["id", "embedding", "content_hash", "encoder", "num_tokens", "truncated"])
def test_a_shard_that_lacks_a_column_is_named(shard_paths, column):
    damage = damaged_by(shard_paths[0], lambda shard: shard.drop_columns([column]))
    assert damage == f"has another schema: there is no column {column}"


@pytest.mark.parametrize(
    ("column", "type_", "nullable"),
    [
        ("embedding", pa.list_(pa.float32()), False),
        ("embedding", pa.list_(pa.float64(), EMBEDDING_DIM), False),
        ("embedding", pa.list_(pa.float32(), EMBEDDING_DIM), True),
        ("content_hash", pa.binary(), False),
        ("num_tokens", pa.int64(), False),
    ],
)
def test_a_shard_with_a_column_of_another_type_is_named(shard_paths, column, type_, nullable):
    def damage(shard):
        place = shard.schema.get_field_index(column)
        return shard.set_column(place, pa.field(column, type_, nullable), shard[column].cast(type_))

    message = damaged_by(shard_paths[0], damage)
    assert message.startswith(f"has another schema: pyarrow.Field<{column}: ")
    assert f"is not pyarrow.Field<{column}: " in message


def test_a_shard_with_shorter_vectors_is_named(shard_paths):
    def damage(shard):
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(3 * 128, dtype=np.float32)), 128)
        return shard.set_column(1, pa.field("embedding", vectors.type, False), vectors)

    assert "fixed_size_list<element: float>[128] not null> is not" in damaged_by(shard_paths[0], damage)


def test_a_shard_of_another_encoder_than_its_manifest_says_is_named(shard_paths):
    rows = [SHARDS[0][0], SHARDS[0][1]._replace(encoder="0" * 64)]
    message = damaged_by(shard_paths[0], lambda _: table(rows, NO_FIELDS))
    assert message == f"holds vectors of another encoder (['{FINGERPRINT}', '{'0' * 64}'])"


@pytest.mark.parametrize("place", [0.2, 0.5])
def test_a_shard_damaged_in_its_middle_is_named(shard_paths, place):
    data = bytearray(Path(shard_paths[0]).read_bytes())
    data[int(place * len(data))] ^= 0xFF
    message = damaged_by(shard_paths[0], lambda _: bytes(data))
    assert message.startswith("cannot be decoded (could not verify page integrity, CRC checksum verification failed")


def test_a_shard_that_is_cut_or_gone_is_named(shard_paths):
    data = Path(shard_paths[0]).read_bytes()
    assert damaged_by(shard_paths[0], lambda _: data[:-100]).startswith("is not Parquet (")
    gone = as_shards(shard_paths)[1]
    Path(gone.path).unlink()
    for fingerprint in (FINGERPRINT, None):
        with pytest.raises(DamagedSnapshotError, match=f"{gone.path} is missing"):
            list(known_vectors._ReadShard(fingerprint).process(gone))


def test_a_footer_with_any_byte_changed_carries_nothing_forward_and_hides_no_id(shard_paths):
    """The pages' checksums do not cover it, and pyarrow itself reads other values, or fewer rows, from some."""
    shard = as_shards(shard_paths)[0]
    data = Path(shard.path).read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    for place in range(footer, len(data), 3):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        Path(shard.path).write_bytes(flipped)
        with pytest.raises(DamagedSnapshotError, match=f"{shard.path} does not have the checksum sha256:"):
            list(known_vectors._ReadShard(FINGERPRINT).process(shard))
        with suppress(DamagedSnapshotError):
            assert list(known_vectors._ReadShard(None).process(shard)) == [(id_, PREVIOUS) for id_ in "abc"], place


def test_a_page_that_pyarrow_passes_over_hides_no_row(shard_paths):
    shard = as_shards(shard_paths)[0]
    data = bytearray(Path(shard.path).read_bytes())
    data[5] ^= 2  # The first page's type: now an index.
    Path(shard.path).write_bytes(data)
    assert sum(map(len, read_shard(shard.path, ["id"]))) == 0
    with pytest.raises(DamagedSnapshotError, match=f"{shard.path} holds 0 rows, not 3: "):
        list(known_vectors._ReadShard(None).process(shard))
    assert list(known_vectors._ReadShard(None, skip_damaged=True).process(shard)) == []


def test_a_shard_on_gs_is_read_once_and_its_rows_are_counted(gcs_bucket, monkeypatch):
    path = f"{gcs_bucket}/embeddings-00000-of-00001.parquet"
    storage.create_exclusively(path, parquet_bytes(table(SHARDS[0])))
    monkeypatch.setattr(storage, "checksum", None)
    assert len(list(known_vectors._ReadShard(FINGERPRINT).process(Shard(path, 3, "sha256:0")))) == 3 + 2
    with pytest.raises(DamagedSnapshotError, match=f"{path} holds 3 rows, not 4: .* --full"):
        list(known_vectors._ReadShard(FINGERPRINT).process(Shard(path, 4, "sha256:0")))


def test_where_only_ids_matter_a_damaged_shard_may_be_skipped(shard_paths):
    ids = [row.id for row in SHARDS[1]]
    path = Path(shard_paths[0])
    path.write_bytes(path.read_bytes()[:-100])
    with Pipeline(options=PipelineOptions(["--runner=FnApiRunner"])) as pipeline:
        found, known = pipeline | ReadKnownVectors(as_shards(shard_paths), False, [], FINGERPRINT, skip_damaged=True)
        assert_that(found, equal_to([(id_, PREVIOUS) for id_ in ids]), label="ids")
        assert_that(known, equal_to([]), label="vectors")


def test_a_damaged_shard_fails_the_pipeline_with_its_name(shard_paths):
    Path(shard_paths[0]).write_bytes(parquet_bytes(table(SHARDS[0]).drop_columns(["embedding"])))
    with pytest.raises(Exception, match=f"{shard_paths[0]} .*has another schema.* --full"):
        read(shard_paths)


def test_want_of_memory_is_not_taken_for_torn_work(tmp_path, monkeypatch):
    path = tmp_path / "vectors-1.parquet"
    path.write_bytes(b"whole or not")

    def fail(*_, **__):
        raise pa.ArrowMemoryError("malloc of size 1 failed")

    assert read_work(str(path), "f") is None
    monkeypatch.setattr(pq, "ParquetFile", fail)
    with pytest.raises(pa.ArrowMemoryError):
        read_work(str(path), "f")

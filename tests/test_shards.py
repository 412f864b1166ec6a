"""What is read from the shards of a snapshot, and what is said of damaged ones."""

import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from google.api_core.exceptions import Forbidden
from google.cloud.storage import Blob
from requests.exceptions import ConnectionError as RequestsConnectionError
from snapshot_helper import NO_FIELDS, embedding, publish_rows, table

from transforms import storage
from transforms.gcs import GcsError
from transforms.schema import FIXED_COLUMNS
from transforms.shards import DamagedSnapshotError, embeddings_of, open_shard, read_shard

pytest_plugins = ["gcs_emulator"]

ROWS = [embedding(f"d{i}") for i in range(10)]


@pytest.fixture
def local(tmp_path) -> str:
    return str(tmp_path / "output")


def test_a_shard_on_gs_that_is_missing_is_named(gcs_bucket):
    snapshot = publish_rows(gcs_bucket, ROWS)
    storage.delete_files(snapshot.shard_paths[2:])
    with pytest.raises(DamagedSnapshotError, match=r"gs://.*embeddings-00002-of-00003.parquet is missing"):
        list(read_shard(snapshot.shard_paths[2]))


@pytest.mark.parametrize(
    ("raised", "expected"), [(RequestsConnectionError("no route"), GcsError), (Forbidden("no"), PermissionError)]
)
def test_a_shard_that_cannot_be_reached_is_not_called_damaged(gcs_bucket, monkeypatch, raised, expected):
    path = publish_rows(gcs_bucket, ROWS).shard_paths[0]
    download = Blob.download_as_bytes
    downloads_left = 0

    def download_or_fail(*arguments, **options):
        nonlocal downloads_left
        downloads_left -= 1
        if downloads_left < 0:
            raise raised
        return download(*arguments, **options)

    monkeypatch.setattr(Blob, "download_as_bytes", download_or_fail)
    with pytest.raises(expected, match=path), open_shard(path):
        pass
    downloads_left = 1  # The footer.
    with pytest.raises(expected, match=path):
        list(read_shard(path))
    downloads_left = 100
    assert sum(map(len, read_shard(path))) == 4


def test_shards_that_cannot_be_read_are_named(local):
    snapshot = publish_rows(local, ROWS)
    missing, garbled, flipped = snapshot.shard_paths
    os.unlink(missing)
    Path(garbled).write_bytes(b"not Parquet")
    data = bytearray(Path(flipped).read_bytes())
    data[len(data) // 4] ^= 1
    Path(flipped).write_bytes(data)
    for path, message in ((missing, "is missing"), (garbled, "is not Parquet"), (flipped, "cannot be decoded")):
        with pytest.raises(DamagedSnapshotError, match=f"{os.path.basename(path)} {message}"):
            list(read_shard(path))
    with pytest.raises(DamagedSnapshotError, match="is missing"), open_shard(missing):
        pass


def test_a_footer_with_any_byte_changed_gives_rows_or_an_error_that_names_the_shard(local):
    path = Path(publish_rows(local, ROWS[:3]).shard_paths[0])
    data = path.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    named = []
    for place in range(footer, len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 0x80 if place % 2 else 1 << place // 2 % 8  # The highest bit makes texts of it no UTF-8.
        path.write_bytes(flipped)
        try:
            with open_shard(str(path)) as shard:
                assert shard.schema_arrow.names
            list(read_shard(str(path), FIXED_COLUMNS.names))
        except DamagedSnapshotError as error:
            named.append(error.args[0])
    assert set(named) == {str(path)}
    assert len(named) > (len(data) - footer) / 4  # The others are statistics, and the writer's name.


# Vectors.


def test_vectors_of_a_batch_are_a_matrix_also_of_a_slice():
    batch = table(ROWS).to_batches()[0]
    expected = np.stack([row.embedding for row in ROWS])
    np.testing.assert_array_equal(embeddings_of(batch), expected)
    np.testing.assert_array_equal(embeddings_of(batch.slice(3, 4)), expected[3:7])
    assert embeddings_of(batch.slice(0, 0)).shape == (0, 256)
    assert table(ROWS).schema.names == FIXED_COLUMNS.names
    assert NO_FIELDS.names == []


@pytest.mark.parametrize("raised", [pa.ArrowMemoryError("malloc of size 1 failed"), OSError(5, "Input/output error")])
def test_want_of_memory_or_a_failing_disk_is_not_called_damage(local, monkeypatch, raised):
    path = publish_rows(local, ROWS).shard_paths[0]
    opened = pq.ParquetFile

    class Failing(opened):
        def iter_batches(self, *args, **kwargs):
            raise raised
            yield

    monkeypatch.setattr(pq, "ParquetFile", Failing)
    with pytest.raises(type(raised), match=re.escape(str(raised))):
        list(read_shard(path))
    monkeypatch.setattr(pq, "ParquetFile", lambda *_, **__: (_ for _ in ()).throw(raised))
    with pytest.raises(type(raised), match=re.escape(str(raised))), open_shard(path):
        pass

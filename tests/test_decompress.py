import bz2
import gzip
import lzma
import random
import zlib

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from transforms.decompress import CorruptStreamError, TruncatedStreamError, decompress, split_codec

COMPRESS = {
    "gz": lambda data: gzip.compress(data, mtime=0),
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.compress,
}
CODECS = sorted(COMPRESS)
SKIPPABLE_FRAME = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"


def words(num_bytes: int) -> bytes:
    generator = random.Random(num_bytes)
    return b" ".join(str(generator.random()).encode() for _ in range(num_bytes // 18 + 1))[:num_bytes]


def read(compressed: bytes, codec: str, chunk_bytes: int = 1000) -> tuple[bytes, type[Exception] | None]:
    """Returns what was decompressed, and the type of the error that ended it."""
    output = bytearray()
    chunks = (compressed[start : start + chunk_bytes] for start in range(0, len(compressed), chunk_bytes))
    try:
        for piece in decompress(chunks, codec):
            output += piece
    except (TruncatedStreamError, CorruptStreamError) as error:
        return bytes(output), type(error)
    return bytes(output), None


@pytest.mark.parametrize(
    ("path", "inner", "codec"),
    [
        ("a/b.jsonl.gz", "a/b.jsonl", "gz"),
        ("gs://a/b.TXT.BZ2", "gs://a/b.TXT", "bz2"),
        ("b.csv.xz", "b.csv", "xz"),
        ("b.zst", "b", "zst"),
        ("b.zstd", "b", "zst"),
        ("b.jsonl", "b.jsonl", None),
        ("gz", "gz", None),
    ],
)
def test_codec_is_split_off_the_path(path, inner, codec):
    assert split_codec(path) == (inner, codec)


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=40, deadline=None)
@given(data=st.binary(max_size=5000), copies=st.integers(1, 400), chunk_bytes=st.integers(1, 3000))
def test_decompress_reverses_compress(codec, data, copies, chunk_bytes):
    assert read(COMPRESS[codec](data * copies), codec, chunk_bytes) == (data * copies, None)


@pytest.mark.parametrize("codec", CODECS)
def test_streams_end_to_end_are_one(codec):
    parts = [words(5000), b"", words(70_000), b"end"]
    assert read(b"".join(map(COMPRESS[codec], parts)), codec) == (b"".join(parts), None)


@pytest.mark.parametrize("codec", CODECS)
def test_every_cut_is_noticed_and_gives_a_prefix(codec):
    data = words(3000)
    compressed = COMPRESS[codec](data)
    for length in range(len(compressed)):
        output, error = read(compressed[:length], codec, chunk_bytes=97)
        assert error is TruncatedStreamError, length
        assert data.startswith(output)


@pytest.mark.parametrize("codec", CODECS)
def test_a_cut_loses_little(codec):
    data = words(2_500_000)
    compressed = COMPRESS[codec](data)
    output, error = read(compressed[: len(compressed) // 2], codec)
    assert error is TruncatedStreamError
    assert data.startswith(output)
    # bz2 has blocks of 900,000 bytes, which come whole or not at all.
    assert len(output) > len(data) // 2 - 1_000_000


@pytest.mark.parametrize("codec", CODECS)
def test_a_cut_in_a_later_stream_keeps_the_earlier_ones(codec):
    data = words(3000)
    stream = COMPRESS[codec](data)
    for length in range(1, len(stream)):
        output, error = read(stream + stream[:length], codec)
        assert error is TruncatedStreamError, length
        assert output.startswith(data)
        assert (data + data).startswith(output)


@pytest.mark.parametrize("codec", ["gz", "bz2", "xz"])
def test_no_flipped_bit_changes_data_unnoticed(codec):
    data = words(2000)
    compressed = COMPRESS[codec](data)
    for position in range(len(compressed)):
        damaged = bytearray(compressed)
        damaged[position] ^= 1 << position % 8
        output, error = read(bytes(damaged), codec)
        assert error is not None or output == data, position


def test_a_bad_checksum_of_zst_is_noticed():
    compressed = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(words(2000)))
    compressed[-1] ^= 1
    assert read(bytes(compressed), "zst")[1] is CorruptStreamError


@pytest.mark.parametrize("codec", CODECS)
def test_garbage_after_the_stream_is_corruption(codec):
    data = words(2000)
    output, error = read(COMPRESS[codec](data) + b"garbage, and more garbage", codec)
    assert (output, error) == (data, CorruptStreamError)


@pytest.mark.parametrize("codec", CODECS)
def test_another_format_is_corruption(codec):
    assert read(b"this is plain text, whatever its name says\n" * 100, codec) == (b"", CorruptStreamError)


@pytest.mark.parametrize("codec", CODECS)
def test_an_empty_file_is_truncated(codec):
    assert read(b"", codec) == (b"", TruncatedStreamError)


@pytest.mark.parametrize("codec", ["gz", "xz"])
@pytest.mark.parametrize("chunk_bytes", [1, 7, 1000])
def test_zero_bytes_after_a_stream_are_padding(codec, chunk_bytes):
    stream = COMPRESS[codec](b"abc")
    padded = stream + bytes(512) + stream + bytes(1024)
    assert read(padded, codec, chunk_bytes) == (b"abcabc", None)


def test_skippable_frames_of_zst_are_skipped():
    stream = zstandard.compress(b"abc")
    assert read(SKIPPABLE_FRAME + stream + SKIPPABLE_FRAME + stream, "zst") == (b"abcabc", None)


def test_zst_with_the_longest_window_is_read():
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    compressed = compressor.compress(b"abc" * 1000) + compressor.flush()
    assert read(compressed, "zst") == (b"abc" * 1000, None)


@pytest.mark.parametrize(
    ("codec", "num_bytes", "most"),
    [
        ("gz", 20 << 20, 1 << 20),
        ("bz2", 20 << 20, 1 << 20),
        ("xz", 20 << 20, 1 << 20),
        ("zst", 300 << 20, 1 << 26),
    ],
)
def test_memory_is_bounded_however_well_the_data_were_compressed(codec, num_bytes, most):
    pieces = decompress([COMPRESS[codec](bytes(num_bytes))], codec)
    sizes = list(map(len, pieces))
    assert sum(sizes) == num_bytes
    assert max(sizes) <= most


def test_many_small_members_take_linear_time():
    member = gzip.compress(b"a line\n", mtime=0)
    assert read(member * 20_000, "gz", chunk_bytes=1 << 20) == (b"a line\n" * 20_000, None)


@pytest.mark.parametrize("codec", CODECS)
def test_errors_of_the_source_pass_through(codec):
    def chunks():
        yield COMPRESS[codec](words(2000))[:100]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(decompress(chunks(), codec))


def test_deflate_output_that_ends_with_a_full_piece_is_whole():
    data = bytes(1 << 21)
    compressor = zlib.compressobj(wbits=31)
    compressed = compressor.compress(data) + compressor.flush()
    assert read(compressed, "gz", chunk_bytes=len(compressed)) == (data, None)

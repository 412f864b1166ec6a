"""Decompresses gz, bz2, xz and zst streams piece by piece, and notices when a stream is cut short or damaged."""

import bz2
import lzma
import zlib
from collections.abc import Iterable, Iterator
from typing import Protocol

import zstandard

_EXTENSIONS = {".gz": "gz", ".bz2": "bz2", ".xz": "xz", ".zst": "zst", ".zstd": "zst"}

_PADDED = ("gz", "xz")
"""Codecs whose streams may be followed by zero bytes."""

_INPUT_BYTES = {"gz": 1 << 16, "bz2": 1 << 16, "xz": 1 << 16, "zst": 1 << 11}
"""How much a stream is given at a time. zst gets little, since its API has no limit for the output and 4 bytes can
become 128 KiB."""

_OUTPUT_BYTES = 1 << 20
"""The most that gz, bz2 and xz give back at a time, however well the data were compressed."""

_ZSTD_WINDOW_BYTES = 1 << 31
"""The largest window, that of `zstd --long=31`; memory is taken only where a file asks for it."""


class TruncatedStreamError(Exception):
    """The data end before the compressed stream does."""


class CorruptStreamError(Exception):
    """The data are not what the codec makes: damaged, of another format, or followed by something else."""


def split_codec(path: str) -> tuple[str, str | None]:
    """Splits the extension of a codec off a path: `a/b.jsonl.gz` gives (`a/b.jsonl`, `gz`).

    Returns:
      The path without that extension, and one of `gz`, `bz2`, `xz`, `zst`, or None where the path has none of them.
    """
    for extension, codec in _EXTENSIONS.items():
        if path.lower().endswith(extension):
            return path[: -len(extension)], codec
    return path, None


def decompress(chunks: Iterable[bytes], codec: str) -> Iterator[bytes]:
    """Yields what compressed chunks hold, as it comes, in pieces of bounded size.

    Several streams laid end to end (as `cat a.gz b.gz` makes) are read as one. Zero bytes after a gz or xz stream are
    padding; anything else there is corruption. A checksum at the end of a stream is verified when the end is reached:
    what was yielded before may turn out to be damaged. A file cut exactly between two streams looks complete.

    Args:
      chunks: the compressed bytes.
      codec: `gz`, `bz2`, `xz` or `zst`.

    Raises:
      TruncatedStreamError: after everything that could be decompressed was yielded. An empty file is truncated too.
      CorruptStreamError: likewise. Errors of `chunks` itself pass through.
    """
    stream = _new_stream(codec)
    started = False  # Whether the current stream was given any byte.
    num_ended = 0
    for data in _pieces(chunks, _INPUT_BYTES[codec]):
        while data:
            if num_ended and not started and codec in _PADDED:
                data = data.lstrip(b"\0")
                if not data:
                    break
            started = True
            try:
                yield from stream.feed(data)
            except (zlib.error, OSError, lzma.LZMAError, zstandard.ZstdError) as error:
                where = f" after {num_ended} whole" if num_ended else ""
                raise CorruptStreamError(f"not a sound {codec} stream{where}: {error}") from error
            if not stream.ended:
                break
            data = stream.unused
            stream, started = _new_stream(codec), False
            num_ended += 1
    if started or not num_ended:
        raise TruncatedStreamError(f"the {codec} stream is cut short")


def _pieces(chunks: Iterable[bytes], num_bytes: int) -> Iterator[bytes]:
    for chunk in chunks:
        for start in range(0, len(chunk), num_bytes):
            yield chunk[start : start + num_bytes]


class _Stream(Protocol):
    """One compressed stream: `feed` yields its contents; then `ended` and `unused` say how far it went."""

    ended: bool
    unused: bytes

    def feed(self, data: bytes) -> Iterator[bytes]: ...


def _new_stream(codec: str) -> _Stream:
    if codec == "gz":
        return _GzipStream()
    if codec == "bz2":
        return _LimitedStream(bz2.BZ2Decompressor())
    if codec == "xz":
        return _LimitedStream(lzma.LZMADecompressor(format=lzma.FORMAT_XZ))
    return _ZstdStream()


class _GzipStream:
    """One gz member; `zlib` hands back the input it did not get to."""

    def __init__(self) -> None:
        self._decompressor = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        self.ended = False
        self.unused = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        while True:
            output = self._decompressor.decompress(data, _OUTPUT_BYTES)
            if output:
                yield output
            data = self._decompressor.unconsumed_tail
            # A full output may leave more inside, even when all input is used.
            if self._decompressor.eof or (not data and len(output) < _OUTPUT_BYTES):
                break
        self.ended = self._decompressor.eof
        self.unused = self._decompressor.unused_data


class _LimitedStream:
    """One bz2 or xz stream; Python's decompressors keep the input they did not get to."""

    def __init__(self, decompressor: bz2.BZ2Decompressor | lzma.LZMADecompressor) -> None:
        self._decompressor = decompressor
        self.ended = False
        self.unused = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        while True:
            output = self._decompressor.decompress(data, _OUTPUT_BYTES)
            if output:
                yield output
            data = b""
            if self._decompressor.eof or self._decompressor.needs_input:
                break
        self.ended = self._decompressor.eof
        self.unused = self._decompressor.unused_data


class _ZstdStream:
    """One zst frame, a skippable one included."""

    def __init__(self) -> None:
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj()
        self.ended = False
        self.unused = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        output = self._decompressor.decompress(data)
        if output:
            yield output
        self.ended = self._decompressor.eof
        self.unused = self._decompressor.unused_data

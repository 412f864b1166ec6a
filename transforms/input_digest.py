"""Sums up the files and settings a snapshot is made from, so that a later run can tell that none of them changed."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from transforms.files import list_files

SETTLED_SECONDS = 10.0
"""How long before a listing a file must have been written last: one written since may change once more, unseen, at the
same time and size. Wide enough for the clocks of two machines."""


def input_digest(
    patterns: Sequence[str], settings: Mapping[str, Any], now: float, output: str | None = None
) -> str | None:
    """Returns a SHA-256 over the files' paths, sizes and times of last writing, and over settings.

    Args:
      patterns: globs, local or gs://.
      settings: all else that the rows of a snapshot depend on.
      now: seconds since the epoch, taken before the listing.
      output: an output folder, absolute or gs://; what runs wrote there is left out.

    Returns:
      The digest in hex; None where a file was written too shortly before for its time to tell, or has no time.

    Raises:
      OSError: a glob matches nothing, or a file cannot be read.
    """
    files: dict[str, tuple[int, float | None]] = {}
    for pattern in patterns:
        for file, modified_seconds in list_files(pattern, output=output):
            files[file.path] = file.size_bytes, modified_seconds
    if any(seconds is None or seconds > now - SETTLED_SECONDS for _, seconds in files.values()):
        return None
    content = json.dumps([sorted(files.items()), dict(settings)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()

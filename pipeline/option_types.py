"""Types of option values for argparse: numbers within bounds, and places; and wrong usage that it cannot tell."""

import argparse
import re


class UsageError(ValueError):
    """Options that make no sense, whatever the data; the command ends with status 2."""


def not_negative(text: str) -> int:
    """Returns a whole number of at least 0.

    Raises:
      argparse.ArgumentTypeError: the text is none.
    """
    return _at_least(0, text)


def positive(text: str) -> int:
    """Returns a whole number of at least 1.

    Raises:
      argparse.ArgumentTypeError: the text is none.
    """
    return _at_least(1, text)


def at_least_two(text: str) -> int:
    """Returns a whole number of at least 2.

    Raises:
      argparse.ArgumentTypeError: the text is none.
    """
    return _at_least(2, text)


def _at_least(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return value


def fraction(text: str) -> float:
    """Returns a number from 0 to 1.

    Raises:
      argparse.ArgumentTypeError: the text is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def output_folder(text: str) -> str:
    """Returns a folder that can hold snapshots, local or gs://.

    Raises:
      argparse.ArgumentTypeError: the text is none.
    """
    from transforms import storage  # Google's libraries, which it loads, take a while.

    try:
        storage.check_url(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def path_or_url(text: str) -> str:
    """Returns a file or folder of this machine or on gs://.

    Raises:
      argparse.ArgumentTypeError: it is on other storage, or names no object.
    """
    if not re.fullmatch(r"gs://[^/]+/.+" if text.startswith("gs:") else r"(?!.*://).+", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither on this machine nor gs://BUCKET/NAME: name one of these, and copy it there"
        )
    return text


def local_path(text: str) -> str:
    """Returns a path of this machine.

    Raises:
      argparse.ArgumentTypeError: the text is a URL, which would be taken for a folder called `gs:` here.
    """
    if "://" in text or text.startswith("gs:"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not on this machine, and this option takes local paths only: name one, and copy between the "
            "two with `gcloud storage cp -r FROM TO`"
        )
    return text

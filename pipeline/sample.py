"""Writes the sample corpus: the docstrings of Python's own standard library, as JSON Lines.

They are real text about known things, and every machine that runs this has them. Nothing is imported or run: the
sources are parsed. Each line has the fields id (a dotted name such as zipfile.ZipFile.read), text, module and kind
(module, class, function or method).
"""

import argparse
import ast
import hashlib
import json
import os
import platform
import re
import sysconfig
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from transforms import storage

FIELDS = ("id", "text", "module", "kind")
"""Fields of each line, all strings."""

KEPT_FIELDS = ("module", "kind")
"""Those that `embed` copies to its output where the sample is its corpus."""

# Installed packages, tests, and programs that come with the library; what is left is documentation.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "lib2to3"}

_Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `sample`."""
    parser.add_argument(
        "--output",
        type=_file,
        required=True,
        metavar="FILE",
        help="JSON Lines file to write, local or gs://; replaced if it is there",
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs `sample`."""
    write = _upload if storage.is_remote(arguments.output) else _write
    count = write(arguments.output, library_folder())
    print(f"{count:,} docstrings of Python {platform.python_version()} written to {arguments.output}")
    return 0


def write_sample(folder: str | Path) -> Path:
    """Writes the sample corpus into a folder, unless it is there already.

    Args:
      folder: made where missing.

    Returns:
      The file's path; its name tells which Python's library it holds.

    Raises:
      FileNotFoundError: this Python came without the sources of its library.
    """
    library = library_folder()
    key = hashlib.sha256(str(library).encode()).hexdigest()[:8]  # One version can be installed twice and differ.
    path = Path(folder) / f"python-{platform.python_version()}-docstrings-{key}.jsonl"
    if not path.exists():
        _write(path, library)
    return path


def library_folder() -> Path:
    """Returns the folder of this Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def docstrings(library: Path) -> Iterator[dict[str, str]]:
    """Yields the docstrings below a folder of Python sources.

    Args:
      library: the folder; its tests and installed packages are left out.

    Yields:
      `FIELDS` of each docstring, modules by name and definitions as they are written. Ids are unique: where a name is
      defined again, under another condition say, its second docstring is named `name#2`.
    """
    for path, module in _modules(library):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Old escapes in strings, which are not ours to mend.
            tree = ast.parse(path.read_bytes(), str(path))
        times_seen: Counter[str] = Counter()
        for name, kind, text in _definitions(tree, module):
            times_seen[name] += 1
            suffix = f"#{times_seen[name]}" if times_seen[name] > 1 else ""
            yield {"id": name + suffix, "text": text, "module": module, "kind": kind}


def _modules(library: Path) -> list[tuple[Path, str]]:
    modules = []
    for folder, subfolders, files in os.walk(library):
        subfolders[:] = [name for name in subfolders if name.isidentifier() and name not in _SKIPPED]
        package = Path(folder).relative_to(library).parts
        for file in files:
            stem, extension = os.path.splitext(file)
            if extension == ".py" and stem.isidentifier():
                parts = package if stem == "__init__" else (*package, stem)
                modules.append((Path(folder, file), ".".join(parts)))
    return sorted(modules, key=lambda module: module[1])


def _definitions(node: _Definition, name: str, kind: str = "module") -> Iterator[tuple[str, str, str]]:
    """Yields name, kind and docstring of a definition and of those in it."""
    text = ast.get_docstring(node)
    if text and text.strip():
        yield name, kind, text
    yield from _nested(node, name, "method" if isinstance(node, ast.ClassDef) else "function")


def _nested(node: ast.AST, name: str, kind_of_functions: str) -> Iterator[tuple[str, str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _definitions(child, f"{name}.{child.name}", "class")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _definitions(child, f"{name}.{child.name}", kind_of_functions)
        elif isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):  # `if`, `try`: they hold some too.
            yield from _nested(child, name, kind_of_functions)


def _file(text: str) -> str:
    """Returns the name of a file of this machine or on gs://.

    Raises:
      argparse.ArgumentTypeError: it is on other storage, or a folder on gs://.
    """
    if not re.fullmatch(r"gs://[^/]+/(.*[^/])" if text.startswith("gs:") else r"(?!.*://).+", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a file of this machine nor gs://BUCKET/FILE: name one of these, and copy it elsewhere"
        )
    return text


def _upload(url: str, library: Path) -> int:
    """Writes the docstrings of a library to a file on gs://, and returns how many they are."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sample.jsonl"
        count = _write(path, library)
        current = storage.read_versioned(url)
        storage.replace_if_generation(url, path.read_bytes(), storage.ABSENT if current is None else current.generation)
    return count


def _write(file: str | Path, library: Path) -> int:
    """Writes the docstrings of a library to a file, whole or not at all, and returns how many they are."""
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".sample-") as scratch:
        written = Path(scratch) / path.name
        with open(written, "w", encoding="utf-8", newline="\n") as output:
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in docstrings(library))
            count = sum(1 for _ in map(output.write, lines))
        if count == 0:
            raise FileNotFoundError(
                f"no docstrings in {library}: this Python came without the sources of its standard library; name a "
                "corpus of your own with --input, or use another Python"
            )
        os.replace(written, path)
    return count

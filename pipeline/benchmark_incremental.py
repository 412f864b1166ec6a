"""Measures what a second run costs when little of a corpus changed, and where the time goes."""

import argparse
import json
import random
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import embed
from pipeline.option_types import positive
from pipeline.options import parse
from pipeline.sample import write_sample
from pipeline.text_table import text_table
from transforms import progress

CHANGED, DELETED, NEW = 0.01, 0.005, 0.005
"""Of the documents, from the first run to the second."""

_WORDS = range(8, 15)
"""Words of a document, not all of them in the vocabulary: some 45 tokens; how many it were is printed."""

_FEWEST_DOCUMENTS = 200
"""So that at least one is changed, deleted and new."""

_PHASES = ("planning", "reading", "shuffling", "encoding", "writing")
_SAMPLE_SECONDS = 0.02


class Timed(NamedTuple):
    """A run with its manifest and the seconds of its phases, in the order of `_PHASES`."""

    manifest: dict[str, Any]
    phases: tuple[float, ...]
    save_seconds: float

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return sum(self.phases)


def number_of_documents(text: str) -> int:
    """Returns how many documents `--documents` asks for.

    Raises:
      argparse.ArgumentTypeError: it is no number, or too small for half a percent of it to be a document.
    """
    number = positive(text)
    if number < _FEWEST_DOCUMENTS:
        raise argparse.ArgumentTypeError(f"{number} is below {_FEWEST_DOCUMENTS}")
    return number


def run(documents: int, checkpoint: str, device: str, dtypes: Sequence[str] | None) -> None:
    """Runs a corpus, the same with little changed, and one with half its texts repeated; prints what they cost."""
    options = [f"--checkpoint={checkpoint}", f"--device={device}"] + [
        f"--dtype={dtype}" for dtype in (dtypes or [])[:1]
    ]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        texts = dict(enumerate(_texts(documents, folder)))
        source, output = folder / "corpus.jsonl", folder / "output"
        _write(source, texts.items())
        first = _timed(source, output, options)
        changed = _edited(texts, documents)
        _write(source, changed.items())
        second = _timed(source, output, options)
        half = list(texts.values())[: documents // 20]  # Smaller: what counts is how many texts the model sees.
        _write(source, enumerate(half + half))
        repeated = _timed(source, folder / "repeated", options)
    rows = [
        [phase, round(one, 2), round(two, 2), f"{two / first.seconds:.2%}"]
        for phase, one, two in zip(_PHASES, first.phases, second.phases, strict=True)
    ]
    rows.append(["all", round(first.seconds, 2), round(second.seconds, 2), f"{second.seconds / first.seconds:.2%}"])
    print(f"{documents:,} documents; then {CHANGED:.1%} changed, {DELETED:.1%} deleted, {NEW:.1%} new")
    print(text_table(["phase", "first run, s", "second run, s", "of the first run"], rows))
    for name, timed in (("first", first), ("second", second), ("half its texts repeated", repeated)):
        print(f"{name}: {_described(timed.manifest['counts'])}")
    share = first.save_seconds / first.seconds
    print(f"saving work in progress: {first.save_seconds:.2f} s of the first run, {share:.2%}")


def _texts(documents: int, folder: Path) -> list[str]:
    """Returns distinct short texts of the sample corpus's words, always the same ones."""
    with open(write_sample(folder), encoding="utf-8") as lines:
        words = sorted({word for line in lines for word in json.loads(line)["text"].split()})
    generator = random.Random(0)
    return [f"{' '.join(generator.choices(words, k=generator.choice(_WORDS)))} {number}" for number in range(documents)]


def _edited(texts: dict[int, str], documents: int) -> dict[int, str]:
    """Returns the corpus of the second run."""
    changed, deleted, new = (round(documents * share) for share in (CHANGED, DELETED, NEW))
    edited = {number: f"{text} once more" if number < changed else text for number, text in texts.items()}
    for number in range(changed, changed + deleted):
        del edited[number]
    return edited | {documents + number: f"a new text, number {number}" for number in range(new)}


def _write(path: Path, texts: Iterable[tuple[int, str]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": str(number), "text": text}) + "\n" for number, text in texts)


def _timed(source: Path, output: Path, options: Sequence[str]) -> Timed:
    """Runs a job in this process and watches how far it is."""
    times: dict[str, float] = {}
    stop = threading.Event()

    def watch() -> None:
        last: dict[str, int] = {}
        while not stop.wait(_SAMPLE_SECONDS):
            tallies, now = progress.tallies(), time.perf_counter()
            for name in tallies:
                if tallies[name] != last.get(name):
                    times.setdefault(f"first {name}", now)
                    times[f"last {name}"] = now
            last = tallies

    progress.reset()
    started = time.perf_counter()
    watcher = threading.Thread(target=watch)
    job = embed.plan(parse([f"--input={source}", f"--output={output}", *options]))
    assert job is not None  # Only with --skip_unchanged.
    planned = time.perf_counter()
    watcher.start()
    try:
        manifest = embed.run(job)
    finally:
        stop.set()
        watcher.join()
    ended = time.perf_counter()
    read = times.get("last documents_read", planned)
    tokenized = max(read, times.get("first texts_to_encode", read))
    encoded = max(tokenized, times.get("last texts_encoded", tokenized))
    phases = (planned - started, read - planned, tokenized - read, encoded - tokenized, ended - encoded)
    return Timed(manifest, phases, progress.tallies().get("save_microseconds", 0) / 1e6)


def _described(counts: dict[str, int]) -> str:
    return (
        f"read {counts['read']:,}, embedded {counts['embedded']:,}, reused {counts['reused']:,}, deleted "
        f"{counts['deleted']:,}; the model saw {counts['texts_encoded']:,} texts of {counts['tokens']:,} tokens"
    )

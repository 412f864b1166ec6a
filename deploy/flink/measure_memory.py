"""Measures the memory of a runner on this machine, an embedded Flink say, for growing corpora; not part of the tests.

  .venv/bin/python deploy/flink/measure_memory.py [--runner {flink,prism,local}] [--heap 2g] [SIZE ...]

Each size is a number of short documents, half of them with a text that another one has too. They are embedded with a
tiny encoder of random weights: what is measured is the job, not the model. Memory that does not grow with the corpus
is on disk, not in these processes. Needs Linux.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import WORDS, make_tiny_encoder  # noqa: E402 - found only now.

_SIZES = (100_000, 300_000, 1_000_000)
_LOOK_SECONDS = 0.5

_ENGINES = ("java", "prism")
"""In the names of programs that hold what passes between steps; the local runner has none of its own."""


def write_corpus(path: Path, size: int) -> None:
    """Writes documents of 3 to 12 words."""
    words = random.Random(size)
    text = ""
    with open(path, "w") as file:
        for number in range(size):
            if number % 2 == 0:
                text = " ".join([*words.choices(WORDS, k=words.randint(3, 12)), str(number)])
            file.write(json.dumps({"id": f"id{number}", "text": text}) + "\n")


def descendants(process_id: int) -> Iterator[int]:
    """Yields the ids of a process and of all it has started."""
    yield process_id
    for thread in Path(f"/proc/{process_id}/task").iterdir():
        for child in (thread / "children").read_text().split():
            yield from descendants(int(child))


def memory_mb(process_id: int) -> dict[str, int]:
    """Returns the memory of the largest process of each program among a process and its descendants.

    Pages of files are not counted: Flink maps what waits between two steps, and the system takes these pages back.
    """
    found: dict[str, int] = {}
    for one in descendants(process_id):
        status = dict(line.split(":", 1) for line in Path(f"/proc/{one}/status").read_text().splitlines())
        kilobytes = int(status.get("RssAnon", "0 kB").split()[0])
        program = Path(os.readlink(f"/proc/{one}/exe")).name
        name = "engine" if any(engine in program for engine in _ENGINES) else "python"
        found[name] = max(found.get(name, 0), kilobytes // 1024)
    return found


def measure(runner: list[str], corpus: Path, checkpoint: Path, output: Path) -> tuple[float, dict[str, int]]:
    """Returns the seconds and the peaks of a run, which must publish."""
    command = [sys.executable, "-m", "pipeline", *runner, f"--input={corpus}", f"--checkpoint={checkpoint}"]
    command += [f"--output={output}", "--device=cpu", "--dtype=float32"]
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    peaks: dict[str, int] = {}
    while process.poll() is None:
        try:
            for name, megabytes in memory_mb(process.pid).items():
                peaks[name] = max(peaks.get(name, 0), megabytes)
        except (FileNotFoundError, ProcessLookupError):
            pass  # One of them has just ended.
        time.sleep(_LOOK_SECONDS)
    if process.returncode:
        sys.exit(f"the run failed with status {process.returncode}")
    return time.monotonic() - started, peaks


def main() -> None:
    """Prints a line for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", type=int, default=_SIZES, metavar="SIZE", help="numbers of documents")
    parser.add_argument("--heap", default="2g", help="of Java, -Xmx; default %(default)s")
    parser.add_argument("--runner", choices=("flink", "prism", "local"), default="flink", help="default %(default)s")
    arguments = parser.parse_args()
    options = [f"--job_server_jvm_properties=-Xmx{arguments.heap}"] if arguments.runner == "flink" else []
    print("runner     documents   corpus MB   seconds Engine MB   Python MB", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "tiny"
        make_tiny_encoder().save_pretrained(checkpoint)
        for size in arguments.sizes:
            corpus = Path(folder) / f"{size}.jsonl"
            write_corpus(corpus, size)
            seconds, peaks = measure([arguments.runner, *options], corpus, checkpoint, Path(folder) / f"out-{size}")
            megabytes = corpus.stat().st_size / 1e6
            print(
                f"{arguments.runner:8}{size:12,}{megabytes:12,.0f}{seconds:10,.0f}{peaks.get('engine', 0):10,}"
                f"{peaks['python']:12,}",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""Whatever happens between runs, incremental runs give what one full run gives in the end."""

import functools
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from job_runs import make_job, published_rows, run_job
from test_inference import tokenized_documents

from pipeline.graph import Job
from transforms import storage
from transforms.encoder import BertLstmEncoder
from transforms.known_vectors import write_work
from transforms.loaded_encoder import Encoded, LoadedEncoder
from transforms.schema import Document, content_hash
from transforms.snapshots import list_work, work_folder

KEPT = pa.schema([("year", pa.int64())])
IDS = ["a", "b", "c", "d", "e", None]  # None: the input names no id.
READ, WRITE, FAST, SLOW, COLOURS = "read a file", "write the archive", "fast", "slow slow slow", "red green blue lines"
LONG = "the zip archive is fast " * 12  # More than a window.
EMPTY = "\u200b"  # The tokenizer keeps nothing of it.
TEXTS = [READ, WRITE, FAST, SLOW, COLOURS, LONG, EMPTY]
FEW_TOKENS = 2  # Cuts some of the texts.


class Line(NamedTuple):
    """One document of a corpus."""

    id: str | None
    text: str
    year: int
    source: str


class Crash(NamedTuple):
    """A run that dies once the vectors of some texts are saved, `torn` of them in a file that is not whole."""

    max_tokens: int | None
    saved: list[str]
    torn: list[str]


class Step(NamedTuple):
    """A run over a corpus, and the run that died before it."""

    corpus: list[Line]
    max_tokens: int | None
    full: bool
    crash: Crash | None


# Few ids and texts, so that from run to run, and within one, documents are edited, renamed, repeated and gone.
lines = st.builds(
    Line, st.sampled_from(IDS), st.sampled_from(TEXTS), st.integers(2000, 2001), st.sampled_from(["1.csv", "2.csv"])
)
token_limits = st.sampled_from([None, None, None, FEW_TOKENS])
some_texts = st.lists(st.sampled_from(TEXTS[:-1]), max_size=4, unique=True)
crashes = st.builds(Crash, token_limits, some_texts, some_texts)
steps = st.builds(
    Step,
    st.lists(lines, min_size=3, max_size=9),
    token_limits,
    st.sampled_from([False, False, False, False, True]),
    st.none() | crashes,
)

# What is rare among those that are drawn.
LAST = [
    Line("a", READ, 2000, "1.csv"),  # As it was before the model changed twice.
    Line("b", LONG, 2001, "1.csv"),
    Line("c", EMPTY, 2001, "2.csv"),
    Line(None, COLOURS, 2001, "1.csv"),
]
HISTORY = [
    Step(
        [
            Line("a", READ, 2000, "1.csv"),
            Line("b", WRITE, 2000, "1.csv"),
            Line("c", READ, 2001, "2.csv"),
            Line(None, FAST, 2000, "2.csv"),
            Line(None, FAST, 2001, "1.csv"),
        ],
        None,
        False,
        None,
    ),
    # Saved are a text that the last snapshot holds, new ones, and one that no document has any more.
    Step(
        [
            Line("a", WRITE, 2000, "1.csv"),  # Edited.
            Line("d", READ, 2000, "2.csv"),  # Renamed.
            Line("e", SLOW, 2000, "2.csv"),
            Line("e", COLOURS, 2001, "1.csv"),  # Wins.
            Line(None, FAST, 2001, "1.csv"),
        ],
        None,
        False,
        Crash(None, [READ, SLOW, COLOURS, LONG], [WRITE]),
    ),
    Step(LAST, FEW_TOKENS, False, Crash(None, [LONG], [])),
    Step(LAST, None, False, Crash(FEW_TOKENS, [READ, LONG], [])),
]


def documents_of(corpus: list[Line]) -> list[Document]:
    return [
        Document(
            line.id or content_hash(line.text), line.text, line.source, place, {"year": line.year}, line.id is None
        )
        for place, line in enumerate(corpus)
    ]


@dataclass
class Expected:
    """What is known of an output folder, kept beside it: vectors by the hashes of their texts.

    Attributes:
      checkpoint: of all runs.
      encoder: what the last snapshot was encoded with; None before the first one.
      held: the last snapshot's vectors.
      saved: by encoder, those that unfinished runs have saved.
      ids: of the last snapshot.
    """

    checkpoint: str
    encoder: str | None = None
    held: dict[str, bytes] = field(default_factory=dict)
    saved: dict[str, dict[str, set[bytes]]] = field(default_factory=dict)
    ids: set[str] = field(default_factory=set)

    def crash(self, output: str, corpus: list[Line], crash: Crash) -> None:
        """Plans a run and abandons it; its vectors can be told from those of any other run."""
        job = self._job(output, corpus, crash.max_tokens, False)
        folder = work_folder(output, job.run.name)
        saved, torn = (self._encoded(texts, crash.max_tokens) for texts in (crash.saved, crash.torn))
        if torn:
            path = Path(write_work(folder, job.fingerprint, torn))
            path.write_bytes(path.read_bytes()[:-1])
        if saved:
            write_work(folder, job.fingerprint, saved)
        for one in saved:
            by_hash = self.saved.setdefault(job.fingerprint, {})
            by_hash.setdefault(one.content_hash, set()).add(one.vector.tobytes())
        # It was about to publish.
        storage.create_exclusively(f"{job.run.folder}/embeddings-00000-of-00001.parquet", b"nobody reads this")

    def run(self, output: str, step: Step) -> None:
        """Runs the job, and checks its counts and where each vector comes from."""
        job = self._job(output, step.corpus, step.max_tokens, step.full)
        manifest = run_job(job)
        assert "not_published" not in manifest
        rows = published_rows(output)

        winners = self._winners(step.corpus)
        usable = {id_: document for id_, document in winners.items() if document.text != EMPTY}
        held = self.held if self.encoder == job.fingerprint and not step.full else {}
        saved = self.saved.get(job.fingerprint, {}) if not step.full else {}
        hashes = {id_: content_hash(document.text) for id_, document in usable.items()}
        recovered = sum(one in saved and one not in held for one in hashes.values())
        reused = sum(one in held for one in hashes.values()) + recovered
        assert {name: manifest["counts"][name] for name in EXPECTED_COUNTS} == {
            "read": len(step.corpus),
            "embedded": len(usable) - reused,
            "reused": reused,
            "recovered": recovered,
            "rejected": len(step.corpus) - len(usable),
            "deleted": len(self.ids - set(winners)),
            "texts_encoded": len(set(hashes.values()) - set(held) - set(saved)),
        }
        assert manifest["rejected_by_reason"] == Counter(
            ["empty_text"] * (len(winners) - len(usable)) + ["duplicate_id"] * (len(step.corpus) - len(winners))
        )
        assert {id_: (row["content_hash"], row["year"]) for id_, row in rows.items()} == {
            id_: (hashes[id_], document.fields["year"]) for id_, document in usable.items()
        }
        vectors = {row["content_hash"]: row["embedding"] for row in rows.values()}
        for row in rows.values():
            assert row["embedding"] == vectors[row["content_hash"]], "equal texts, equal vectors"
        for text_hash, vector in vectors.items():
            if text_hash in held:
                assert vector == held[text_hash], "held: carried forward bit for bit"
            elif text_hash in saved:
                assert vector in saved[text_hash], "saved: taken up bit for bit"
        assert list_work(output) == []
        self.encoder, self.held, self.saved, self.ids = job.fingerprint, vectors, {}, set(rows)

    def _job(self, output: str, corpus: list[Line], max_tokens: int | None, full: bool) -> Job:
        return make_job(
            output,
            self.checkpoint,
            documents_of(corpus),
            kept_fields=KEPT,
            max_tokens=max_tokens,
            full=full,
            rows_per_shard=3,
        )

    def _winners(self, corpus: list[Line]) -> dict[str, Document]:
        """Of each id, the first document by source and position."""
        ordered = sorted(documents_of(corpus), key=lambda document: (document.source, document.position))
        return {document.id: document for document in reversed(ordered)}

    def _encoded(self, texts: list[str], max_tokens: int | None) -> list[Encoded]:
        if not texts:
            return []
        encoder = BertLstmEncoder.from_pretrained(self.checkpoint, max_tokens)
        results = LoadedEncoder(encoder, 2048).encode_documents(tokenized_documents(encoder, texts))
        # The last bits are as no run computes them.
        return [
            one._replace(vector=np.nextafter(one.vector, np.float32(1))) for one in results if isinstance(one, Encoded)
        ]


EXPECTED_COUNTS = ("read", "embedded", "reused", "recovered", "rejected", "deleted", "texts_encoded")


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    """The tiny checkpoint, loaded once by each number of tokens and not by every run."""
    with pytest.MonkeyPatch.context() as patch:
        load = functools.lru_cache(BertLstmEncoder.from_pretrained)
        patch.setattr(BertLstmEncoder, "from_pretrained", lambda *arguments: load(*arguments))
        yield tiny_checkpoint


@pytest.mark.slow
@settings(
    max_examples=5,
    derandomize=True,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # To shrink a failure would take many minutes.
    suppress_health_check=[HealthCheck.too_slow],
)
@example(history=HISTORY)
@given(history=st.lists(steps, min_size=2, max_size=4))
def test_incremental_runs_give_row_for_row_what_one_full_run_gives(checkpoint, history):
    with tempfile.TemporaryDirectory() as folder:
        expected, output = Expected(checkpoint), f"{folder}/incremental"
        for step in history:
            if step.crash is not None:
                expected.crash(output, step.corpus, step.crash)
            expected.run(output, step)
        rows = published_rows(output)
        last = history[-1]
        Expected(checkpoint).run(f"{folder}/full", last._replace(full=True))
        full_rows = published_rows(f"{folder}/full")

    assert {id_: without_vector(row) for id_, row in rows.items()} == {
        id_: without_vector(row) for id_, row in full_rows.items()
    }
    for id_, row in rows.items():
        vector, full_vector = (np.frombuffer(one["embedding"], np.float32) for one in (row, full_rows[id_]))
        assert vector @ full_vector > 0.99999, id_


def without_vector(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "embedding"}

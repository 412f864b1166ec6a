"""What is new, changed, unchanged or deleted: documents meet each other, and vectors already known, in shuffles.

Vectors belong to texts, so the meeting is by content hash: texts cross the network once, ids and vectors follow them.
Nothing is held in memory but one text's first references; a text shared by a million ids streams through.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.pvalue import TaggedOutput
from apache_beam.transforms.window import GlobalWindows

from transforms.schema import Document, Rejected, content_hash, preview
from transforms.tokenization import SPECIAL_TOKENS_PER_WINDOW

_REFERENCES_WITH_TEXT = 100
"""References that travel with their text through the encoder; those beyond wait for its vector in a shuffle."""

_TEXTS_REMEMBERED = 100_000
"""Texts of a bundle that are not sent a second time."""


class Reference(NamedTuple):
    """A document without its text.

    Attributes:
      id: the document's id.
      source: the file it was read from.
      position: its place in that file.
      fields: its kept fields.
      id_is_hash: true where the input named no id.
      content_hash: of its text.
      preview: the start of its text.
    """

    id: str
    source: str
    position: int
    fields: Any
    id_is_hash: bool
    content_hash: str
    preview: str


class KnownVector(NamedTuple):
    """A text's vector.

    Attributes:
      vector: the 256 float32 numbers as bytes.
      encoder: fingerprint of the encoder that made it.
      num_tokens: tokens of the text that were encoded.
      truncated: true where it had more.
      origin: `encoded`, `reused` or `recovered`, as in `Embedding`.
    """

    vector: bytes
    encoder: str
    num_tokens: int
    truncated: bool
    origin: str


class Unusable(NamedTuple):
    """Why a text has no vector: `reason` is a key of `REJECT_REASONS`."""

    reason: str
    detail: str


class TextToEncode(NamedTuple):
    """A text and the references that want its vector.

    Attributes:
      text: what is to be encoded.
      references: the first references of the text.
      has_more: true where further ones wait for the vector in a shuffle.
    """

    text: str
    references: list[Reference]
    has_more: bool


_RECORDS = (Reference, KnownVector, Unusable)

PREVIOUS = None
"""In the shuffle by id: the last snapshot has a row of this id."""


def pack(record: Reference | KnownVector | Unusable) -> tuple:
    """Returns a record as a plain tuple: Beam encodes these natively, ten times faster than it pickles others."""
    return _RECORDS.index(type(record)), *record


def unpack(value: Any) -> Any:
    """Returns the record that a tuple was packed from; what is no tuple, a text or `PREVIOUS`, stays as it is."""
    return _RECORDS[value[0]]._make(value[1:]) if isinstance(value, tuple) else value


def waiting_references(text: TextToEncode) -> tuple[list[tuple], bool]:
    """Returns what `HandOutVectors` needs of a text that is encoded: its packed references, and whether it has more."""
    return [pack(reference) for reference in text.references], text.has_more


def row_of(reference: Reference, known: KnownVector) -> tuple:
    """Returns the row, as `schema.pack_row` packs it, of a document whose text has this vector."""
    return (
        reference.id,
        known.vector,
        reference.content_hash,
        known.encoder,
        known.num_tokens,
        known.truncated,
        reference.fields,
        known.origin,
    )


def rejected_of(reference: Reference, reason: str, detail: str) -> Rejected:
    """Returns the rejected record of a document."""
    return Rejected(reference.source, reference.position, reference.id, reason, detail, reference.preview)


class _SplitOffText(beam.DoFn):
    """Document to (id, packed Reference), and (content hash, text) once a bundle."""

    TEXTS = "texts"

    def start_bundle(self):
        self._sent: OrderedDict[str, None] = OrderedDict()

    def process(self, document: Document):
        text_hash = content_hash(document.text)
        reference = Reference(
            document.id,
            document.source,
            document.position,
            document.fields,
            document.id_is_hash,
            text_hash,
            preview(document.text),
        )
        yield document.id, pack(reference)
        if text_hash not in self._sent:
            yield TaggedOutput(self.TEXTS, (text_hash, document.text))
        self._sent[text_hash] = None
        self._sent.move_to_end(text_hash)
        if len(self._sent) > _TEXTS_REMEMBERED:
            self._sent.popitem(last=False)


class _PickWinner(beam.DoFn):
    """All of one id to its winning reference; the others are rejected, an id without documents is deleted."""

    REJECTED = "rejected"
    REPEATED = "repeated"
    DELETED = "deleted"

    def process(self, group: tuple[str, Iterable[tuple | None]]):
        document_id, values = group
        winner: Reference | None = None
        for value in values:
            if value is PREVIOUS:
                continue
            reference = unpack(value)
            if winner is None:
                winner = reference
                continue
            winner, loser = sorted((winner, reference), key=_place)
            if loser.id_is_hash:
                yield TaggedOutput(self.REPEATED, loser.id)
            detail = f"a document with this id comes earlier in the corpus; this one is at {_describe_place(loser)}"
            yield TaggedOutput(self.REJECTED, rejected_of(loser, "duplicate_id", detail))
        if winner is None:
            yield TaggedOutput(self.DELETED, document_id)
        else:
            yield winner.content_hash, pack(winner)


def _place(reference: Reference) -> tuple[str, int, str]:
    return reference.source, reference.position, reference.content_hash


def _describe_place(reference: Reference) -> str:
    return f"position {reference.position} of {reference.source}"


@dataclass
class SplitOffTexts(beam.PTransform):
    """Documents to a tuple of (id, packed Reference) and (content hash, text); a bundle sends equal texts once."""

    def expand(self, documents):
        """Wires the split."""
        outputs = documents | "SplitOffText" >> beam.ParDo(_SplitOffText()).with_outputs(
            _SplitOffText.TEXTS, main="references"
        )
        return outputs.references, outputs.texts


@dataclass
class ResolveIds(beam.PTransform):
    """(references by id) to one reference per id: the first by source and position.

    Takes (id, packed Reference or PREVIOUS); gives a tuple of the winners as (content hash, packed Reference), the
    losers as Rejected, the ids of those losers that only repeat a text without an id, and the deleted ids.
    """

    def expand(self, references):
        """Wires the shuffle by id."""
        outputs = (
            references
            | "GroupById" >> beam.GroupByKey()
            | "PickWinner"
            >> beam.ParDo(_PickWinner()).with_outputs(
                _PickWinner.REJECTED, _PickWinner.REPEATED, _PickWinner.DELETED, main="winners"
            )
        )
        return outputs.winners, outputs.rejected, outputs.repeated, outputs.deleted


class _MeetByText(beam.DoFn):
    """All of one content hash to rows, where its vector is known, or else to the text that is to be encoded."""

    ROWS = "rows"
    WAITING = "waiting"
    TALLIES = "tallies"

    def start_bundle(self):
        self._known_tokens = 0

    def finish_bundle(self):
        yield TaggedOutput(self.TALLIES, GlobalWindows.windowed_value(("known_tokens", self._known_tokens)))

    def process(self, group: tuple[str, Iterable[str | tuple]]):
        text_hash, values = group
        text: str | None = None
        known: KnownVector | None = None
        references: list[Reference] = []
        has_more = False
        for value in map(unpack, values):
            if isinstance(value, str):
                text = value
            elif isinstance(value, KnownVector):
                known = _preferred(known, value)
            elif len(references) < _REFERENCES_WITH_TEXT:
                references.append(value)
            else:
                has_more = True
        # Without references, only documents that lost their id to another have this text.
        if references and known is not None:
            # The window of short texts alone: longer ones would have had more, at most some hundredths of their tokens.
            self._known_tokens += known.num_tokens + SPECIAL_TOKENS_PER_WINDOW
            for value in map(unpack, values) if has_more else references:
                if isinstance(value, Reference):
                    yield TaggedOutput(self.ROWS, row_of(value, known))
        elif references:
            if text is None:
                raise AssertionError(f"no text came with content hash {text_hash}")
            yield TextToEncode(text, references, has_more)
            travelling = {reference.id for reference in references}
            for value in map(unpack, values) if has_more else ():
                if isinstance(value, Reference) and value.id not in travelling:
                    yield TaggedOutput(self.WAITING, (text_hash, pack(value)))


def _preferred(one: KnownVector | None, other: KnownVector) -> KnownVector:
    """Returns one of two vectors of a text: the last snapshot's before a crashed run's, so that rows stay."""
    if one is None:
        return other
    return min(one, other, key=lambda known: (known.origin != "reused", known.vector))


@dataclass
class MatchTexts(beam.PTransform):
    """References, texts and known vectors, all by content hash, to rows and to texts that are to be encoded.

    Takes (content hash, str or packed Reference or KnownVector); gives a tuple of packed rows, TextToEncode,
    (content hash, packed Reference) of the references beyond the first hundred of a text that is to be encoded, and
    tallies `known_tokens`: tokens of the texts, each counted once and with the special tokens of one window, whose
    vector is known.
    """

    def expand(self, values):
        """Wires the shuffle by content hash."""
        outputs = (
            values
            | "GroupByText" >> beam.GroupByKey()
            | "MeetByText"
            >> beam.ParDo(_MeetByText()).with_outputs(
                _MeetByText.ROWS, _MeetByText.WAITING, _MeetByText.TALLIES, main="texts"
            )
        )
        return outputs.rows, outputs.texts, outputs.waiting, outputs.tallies


class _HandOut(beam.DoFn):
    """A text's outcome to the rows, or rejected records, of the references that travelled with it."""

    REJECTED = "rejected"
    OUTCOMES = "outcomes"

    def process(self, outcome: tuple[tuple[list[tuple], bool], tuple]):
        (packed_references, has_more), result = outcome
        references = [unpack(reference) for reference in packed_references]
        yield from _handed_out(references, unpack(result))
        if has_more:
            yield TaggedOutput(self.OUTCOMES, (references[0].content_hash, result))


class _HandOutToWaiting(beam.DoFn):
    """All of one content hash, an outcome and the references that waited for it, to rows or rejected records."""

    def process(self, group: tuple[str, Iterable[tuple]]):
        text_hash, values = group
        result = next((value for value in map(unpack, values) if not isinstance(value, Reference)), None)
        if result is None:
            raise AssertionError(f"no outcome for content hash {text_hash}, whose references wait for one")
        yield from _handed_out((value for value in map(unpack, values) if isinstance(value, Reference)), result)


def _handed_out(references: Iterable[Reference], result: KnownVector | Unusable):
    for reference in references:
        if isinstance(result, Unusable):
            yield TaggedOutput(_HandOut.REJECTED, rejected_of(reference, *result))
        else:
            yield row_of(reference, result)


@dataclass
class HandOutVectors(beam.PTransform):
    """(outcomes, waiting) to (rows, rejected): each reference gets the outcome of its text.

    Takes outcomes, a (`waiting_references`, packed KnownVector or Unusable) for each text, and the waiting references
    of `MatchTexts`; gives a tuple of packed rows and Rejected.
    """

    def expand(self, inputs):
        """Wires the hand-out, and the shuffle for texts with very many references."""
        outcomes, waiting = inputs
        handed_out = outcomes | "HandOut" >> beam.ParDo(_HandOut()).with_outputs(
            _HandOut.REJECTED, _HandOut.OUTCOMES, main="rows"
        )
        late = (
            (handed_out.outcomes, waiting)
            | "FlattenWaiting" >> beam.Flatten()
            | "GroupWaiting" >> beam.GroupByKey()
            | "HandOutToWaiting" >> beam.ParDo(_HandOutToWaiting()).with_outputs(_HandOut.REJECTED, main="rows")
        )
        rows = (handed_out.rows, late.rows) | "FlattenRows" >> beam.Flatten()
        rejected = (handed_out.rejected, late.rejected) | "FlattenRejected" >> beam.Flatten()
        return rows, rejected

"""Exact counts of what is in a PCollection, added up by bundle: a row costs an addition, and one sum travels."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.transforms.window import GlobalWindows


class _Sum(beam.DoFn):
    """Elements to (name, sum) for each tally of a bundle."""

    def __init__(self, name: str, tallies_of: Callable[[Any], Iterable[tuple[str, float]]] | None):
        self._name = name
        self._tallies_of = tallies_of

    def start_bundle(self):
        self._count = 0
        self._sums: Counter[str] = Counter()

    def process(self, element):
        self._count += 1
        if self._tallies_of is not None:
            for name, value in self._tallies_of(element):
                self._sums[name] += value  # type: ignore[assignment]

    def finish_bundle(self):
        for tally in ((self._name, self._count), *self._sums.items()):
            yield GlobalWindows.windowed_value(tally)


@dataclass
class Tally(beam.PTransform):
    """Elements to (name, sum) pairs, one or more for each name, to be added up.

    Attributes:
      name: of the tally that counts the elements.
      tallies_of: gives (name, number) pairs of an element, that are added up as well.
    """

    name: str
    tallies_of: Callable[[Any], Iterable[tuple[str, float]]] | None = None

    def expand(self, elements):
        """Wires the sums."""
        return elements | "SumBundles" >> beam.ParDo(_Sum(self.name, self.tallies_of))


@dataclass
class CountElements(beam.PTransform):
    """Elements to their number, as a PCollection of one int."""

    def expand(self, elements):
        """Wires the tally and the sum of sums."""
        return elements | "CountBundles" >> Tally("") | beam.Values() | "Sum" >> beam.CombineGlobally(sum)

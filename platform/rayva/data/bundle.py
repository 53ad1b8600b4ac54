"""What a data source hands over: the four tables of the data step, and the rows it refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from rayva.data.schema import ImageRecord, Question, Rejected, Sample

T = TypeVar("T")


class Lazy(Generic[T]):
    """An iterable that starts `make` anew each time it is read."""

    def __init__(self, make: Callable[[], Iterator[T]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[T]:
        return self._make()


@dataclass(frozen=True)
class DatasetBundle:
    """Images, the samples of both stages, and held-out questions.

    Each of the four can be iterated once or more, and may be read lazily. `rejected`, and `noted` (how many
    rows are used though something is odd about them, by what it is), are complete only when all four have
    been read to their ends.
    """

    images: Iterable[ImageRecord]
    pretrain: Iterable[Sample]
    finetune: Iterable[Sample]
    questions: Iterable[Question]
    rejected: list[Rejected] = field(default_factory=list)
    noted: Counter[str] = field(default_factory=Counter)

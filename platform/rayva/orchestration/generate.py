"""Instruction generation as a Ray Data pipeline: tasks in a Parquet file, one actor that asks the teacher.

The actor holds many calls in flight from one CPU. Every answer is on the storage before it counts, so a
killed run goes on without paying for anything twice.
"""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from rayva.data.schema import Instance
from rayva.errors import RayvaError
from rayva.instruct.contexts import Context
from rayva.instruct.generator import Attempt, Generator, Outcome
from rayva.instruct.parse import Pair
from rayva.instruct.prompts import PromptSet
from rayva.instruct.rules import Duplicates
from rayva.instruct.tasks import Task
from rayva.instruct.teachers import (
    BatchTeacher,
    EndpointTeacher,
    Requests,
    SymbolicTeacher,
    Teacher,
    endpoint_of,
)
from rayva.llm.cache import AnswerCache
from rayva.llm.client import ChatClient
from rayva.llm.prices import Budget, Price
from rayva.llm.request import ChatAnswer, PermanentError
from rayva.orchestration.faults import user_error
from rayva.orchestration.generate_costs import find_price, price_of
from rayva.progress import Progress
from rayva.recipes.schema import Generation
from rayva.storage import Storage

_BLOCK_ROWS = 4096
"""Tasks that the actor takes at once: calls in flight run dry only at the end of each block."""
_POLL_SECONDS = 1.0
_TASKS = pa.schema(
    [("number", pa.int64()), ("kind", pa.string()), ("repeat", pa.int64()), ("context", pa.string())]
)


class TeacherError(RayvaError):
    """The teacher refuses all calls."""


@dataclass(frozen=True)
class Work:
    """What the actor needs."""

    settings: Generation
    storage: Storage

    def price(self) -> Price:
        """See `price_of`."""
        return price_of(self.settings)


def write_tasks(storage: Storage, rel: str, tasks: Sequence[Task]) -> None:
    """Writes the tasks as a Parquet file, whole or not at all."""
    rows = [
        {"number": n, "kind": t.kind, "repeat": t.repeat, "context": json.dumps(asdict(t.context))}
        for n, t in enumerate(tasks)
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_TASKS), sink, row_group_size=_BLOCK_ROWS)
    storage.write_bytes(rel, sink.getvalue())


def read_task(row: dict[str, Any]) -> Task:
    """The task of a row that `write_tasks` wrote."""
    raw = json.loads(row["context"])
    instances = tuple(Instance(i["category"], tuple(i["bbox"])) for i in raw["instances"])
    context = Context(raw["id"], raw["image"], tuple(raw["captions"]), instances, tuple(raw["crowds"]))
    return Task(row["kind"], row["repeat"], context)


def run_tasks(work: Work, tasks_rel: str, total: int) -> Iterator[tuple[int, Outcome]]:
    """Carries out the tasks of a file: (number, outcome) each, in no particular order.

    Raises:
        RayvaError: the teacher refuses everything, or answers cannot be kept; those from before are.
    """
    board = Board.remote()  # type: ignore[attr-defined]  # added by the decorator
    dataset = ray.data.read_parquet(
        work.storage.path(tasks_rel),
        filesystem=None if work.storage.is_local else work.storage.fs,
    ).map_batches(
        _Asker,
        fn_constructor_kwargs={"work": work, "board": board},
        batch_size=_BLOCK_ROWS,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=1,
    )
    with _Shown(board, total):
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            for row in batch.to_pylist():
                if row["error"]:
                    raise RayvaError(*json.loads(row["error"]))
                yield row["number"], _outcome_from(json.loads(row["outcome"]))


class _Shown:
    """Shows what the actor's board tells while the driver waits for whole blocks."""

    def __init__(self, board: Any, total: int) -> None:
        self._board = board
        self._bar = Progress("generate", total, "samples")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="generate-progress", daemon=True)

    def _poll(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            self._show()

    def _show(self) -> None:
        done, figures = ray.get(self._board.read.remote())
        self._bar.advance(done - self._bar.done, **figures)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if error is None:
            self._show()
        self._bar.close()


@ray.remote(num_cpus=0)
class Board:
    """Figures of the work so far."""

    def __init__(self) -> None:
        self._done, self._figures = 0, dict[str, Any]()

    def write(self, done: int, figures: dict[str, Any]) -> None:
        self._done, self._figures = done, figures

    def read(self) -> tuple[int, dict[str, Any]]:
        return self._done, self._figures


class _Asker:
    """The actor: an event loop of its own, with all calls of a block in flight up to the limit."""

    def __init__(self, work: Work, board: Any) -> None:
        self._work, self._board = work, board
        self._loop = asyncio.new_event_loop()
        self._done = 0
        settings = work.settings
        self._price, self._priced = work.price(), find_price(settings) is not None
        self._cache = AnswerCache(work.storage) if settings.teacher != "symbolic" else None
        spent = sum(self._price.of_answer(answer) for answer in self._cache.answers()) if self._cache else 0.0
        self._budget = Budget(settings.max_cost, spent)
        self._client: ChatClient | None = None
        duplicates = Duplicates(across_images=settings.teacher != "symbolic")
        self._generator = Generator(self._teacher(), settings.attempts, settings.seed, duplicates)

    def _teacher(self) -> Teacher:
        settings = self._work.settings
        if settings.teacher == "symbolic":
            return SymbolicTeacher(settings.seed)
        assert self._cache is not None
        requests = Requests(settings, PromptSet.load(settings.prompts))
        if settings.teacher == "batch":
            return BatchTeacher(self._cache, requests)
        self._client = ChatClient(endpoint_of(settings), self._cache, self._budget, self._price)
        return EndpointTeacher(self._client, requests)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Numbers and outcomes; or what is wrong with all of them, in one row.

        Ray Data hands over no more of an exception than its traceback, so what a person can mend is a row.
        """
        rows = batch.to_pylist()
        try:
            outcomes = self._loop.run_until_complete(self._block([read_task(row) for row in rows]))
        except (RayvaError, OSError) as error:
            known = user_error(error, self._work.storage.root)
            if known is None:
                raise
            return _answered(batch["number"][:1], [""], json.dumps([known.what, known.remedy]))
        return _answered(batch["number"], [json.dumps(asdict(outcome)) for outcome in outcomes], "")

    async def _block(self, tasks: Sequence[Task]) -> list[Outcome]:
        teller = asyncio.create_task(self._tell())
        try:
            if self._client is None:
                return await self._gather(tasks)
            async with self._client:
                return await self._gather(tasks)
        except PermanentError as error:
            raise TeacherError(
                f"The teacher at {self._work.settings.base_url} refuses every call: {error}",
                "check generation.base_url, generation.model and the key in the environment variable "
                f"{self._work.settings.api_key_env}; then run the same command again: answers are kept",
            ) from error
        finally:
            teller.cancel()
            self._report()
            if self._cache is not None:
                self._cache.close()

    async def _gather(self, tasks: Sequence[Task]) -> list[Outcome]:
        running = [asyncio.create_task(self._one(task)) for task in tasks]
        try:
            return await asyncio.gather(*running)
        except BaseException:
            for each in running:
                each.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            raise

    async def _one(self, task: Task) -> Outcome:
        outcome = await self._generator.generate(task)
        self._done += 1
        return outcome

    async def _tell(self) -> None:
        while True:
            self._report()
            await asyncio.sleep(_POLL_SECONDS)

    def _report(self) -> None:
        figures: dict[str, Any] = {}
        if self._client is not None:
            figures = {"calls": self._client.calls}
            if self._priced:
                figures["cost"] = f"${self._budget.spent:.2f}"
            if errors := self._client.errors.total():
                figures["errors"] = errors
        self._board.write.remote(self._done, figures)


def _answered(numbers: Any, outcomes: list[str], error: str) -> pa.Table:
    return pa.table({"number": numbers, "outcome": outcomes, "error": [error] * len(outcomes)})


def _outcome_from(raw: dict[str, Any]) -> Outcome:
    attempts = tuple(Attempt(ChatAnswer(**a["answer"]), a["reason"], a["detail"]) for a in raw["attempts"])
    return Outcome(raw["status"], tuple(Pair(**pair) for pair in raw["pairs"]), attempts, raw["error"])

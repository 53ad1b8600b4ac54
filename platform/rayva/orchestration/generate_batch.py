"""Files of a batch API in place of calls: requests out, results in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rayva.data.locations import absolute
from rayva.instruct.generator import Outcome
from rayva.instruct.teachers import Requests, batch_lines, read_batch_results
from rayva.llm.cache import AnswerCache
from rayva.llm.prices import Budget, Price
from rayva.llm.request import ChatRequest
from rayva.orchestration.generate_costs import spent_at

if TYPE_CHECKING:
    from rayva.orchestration.generate_run import Plan

BATCH_FILE_REQUESTS = 50_000
BATCH_FILE_BYTES = 200_000_000
"""OpenAI's batch API takes no more in one file."""


@dataclass(frozen=True)
class BatchFiles:
    """What is to be given to the batch API.

    Attributes:
        uris: the files.
        requests: how many they hold; `left_out`: how many more wait, because they might pass `max_cost`.
        cost_at_most: dollars of `requests`, their answers being as long as they may be.
    """

    uris: list[str]
    requests: int
    left_out: int
    cost_at_most: float


def write_batch_files(plan: Plan, outcomes: Mapping[int, Outcome], price: Price) -> BatchFiles:
    """Writes what waits for an answer as files for a batch API, as far as the budget allows.

    A task whose answers were rejected, duplicates among them, is asked for again, as often as `attempts`
    allows. All answers at this storage count as spent.

    Args:
        outcomes: of all tasks, by number.
    """
    requests = Requests(plan.settings, plan.prompts)
    waiting = {
        request.digest: request
        for number, outcome in sorted(outcomes.items())
        if outcome.status == "waiting"
        for request in (requests.of(plan.tasks[number], len(outcome.attempts)),)
    }
    budget = Budget(plan.settings.max_cost, spent_at(plan.storage, price))
    affordable = [request for request in waiting.values() if budget.reserve(price.at_most(request))]
    uris = _write(plan, affordable)
    return BatchFiles(uris, len(affordable), len(waiting) - len(affordable), budget.reserved)


def _write(plan: Plan, requests: Sequence[ChatRequest]) -> list[str]:
    """Files with these requests, in place of those from before."""
    for name in plan.storage.list(plan.folder.join("batch")):
        plan.storage.delete(plan.folder.join("batch", name))
    written = []
    lines = (f"{line}\n".encode() for line in batch_lines(requests))
    for number, content in enumerate(split_lines(lines), start=1):
        rel = plan.folder.join("batch", f"requests-{number:03d}.jsonl")
        plan.storage.write_bytes(rel, content)
        written.append(plan.storage.uri(rel))
    return written


def split_lines(
    lines: Iterable[bytes], most_lines: int = BATCH_FILE_REQUESTS, most_bytes: int = BATCH_FILE_BYTES
) -> Iterator[bytes]:
    """The lines in files that are no larger than the batch API takes; a longer line is a file of its own."""
    group: list[bytes] = []
    size = 0
    for line in lines:
        if group and (len(group) == most_lines or size + len(line) > most_bytes):
            yield b"".join(group)
            group, size = [], 0
        group.append(line)
        size += len(line)
    if group:
        yield b"".join(group)


def read_batches(plan: Plan, uris: Sequence[str]) -> dict[str, int]:
    """Puts the answers of a batch API's result files into the cache; returns counts over all files."""
    requests = Requests(plan.settings, plan.prompts)
    attempts = range(plan.settings.attempts)
    by_digest = {r.digest: r for t in plan.tasks for r in (requests.of(t, n) for n in attempts)}
    cache = AnswerCache(plan.storage)
    counts: Counter[str] = Counter()
    for uri in uris:
        counts.update(read_batch_results(absolute(uri), by_digest.get, cache))
    cache.close()
    return dict(counts)

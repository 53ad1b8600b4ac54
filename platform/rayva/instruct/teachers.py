"""Teachers behind one protocol: an endpoint, files of a batch API, and the built-in symbolic one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Protocol

from rayva.data.locations import open_input
from rayva.errors import DataError, RecipeError
from rayva.instruct.prompts import PromptSet
from rayva.instruct.symbolic import symbolic_answer
from rayva.instruct.tasks import Task
from rayva.llm.cache import AnswerCache
from rayva.llm.client import ChatClient, Endpoint
from rayva.llm.request import ChatAnswer, ChatRequest, LLMError, PassingError, Sampling, read_completion
from rayva.recipes.schema import Generation

SYMBOLIC = "symbolic"
_KEPT_AT_ONCE = 1000
"""Answers of a batch that are written together: each write is forced to the disk, or is a new object."""


class NotAnsweredYet(LLMError):
    """The batch that holds this request has not been read yet."""


class Teacher(Protocol):
    """Answers a task, in the format of its kind."""

    async def answer(self, task: Task, attempt: int) -> ChatAnswer:
        """The teacher's words; `attempt` counts from 0, and a later one may give other words.

        Raises:
            LLMError: there is no answer.
        """
        ...


class Requests:
    """What an endpoint is asked for each task."""

    def __init__(self, settings: Generation, prompts: PromptSet) -> None:
        self._settings, self._prompts = settings, prompts
        if settings.model is None:
            raise RecipeError(
                f"generation.teacher={settings.teacher} needs generation.model", "name the teacher's model"
            )
        self.model = settings.model

    def of(self, task: Task, attempt: int = 0) -> ChatRequest:
        """The request for a task.

        One that is asked again, or repeated, differs in its seed and in its last message: a teacher without
        chance in its answers would tell the same once more.
        """
        settings = self._settings
        boxes = task.kind != "conversation" or settings.boxes_in_conversations
        sampling = Sampling(
            settings.temperature, settings.top_p, settings.max_tokens, settings.seed + task.repeat
        )
        messages = _rotated(self._prompts.messages(task.kind, task.context, boxes), task.repeat)
        request = ChatRequest(self.model, _varied(messages, task.repeat, attempt), sampling, attempt)
        return replace(request, sampling=replace(sampling, seed=(sampling.seed or 0) + 1000 * attempt))


def endpoint_of(settings: Generation) -> Endpoint:
    """Where the teacher is.

    Raises:
        RecipeError: the address cannot be one.
    """
    endpoint = Endpoint(
        settings.base_url, settings.api_key_env, settings.concurrency, settings.requests_per_minute,
        settings.tokens_per_minute, settings.timeout,
    )  # fmt: skip
    endpoint.check()
    return endpoint


def _rotated(messages: tuple[dict[str, str], ...], by: int) -> tuple[dict[str, str], ...]:
    """The examples in another order for each repeat."""
    examples = [messages[i : i + 2] for i in range(1, len(messages) - 1, 2)]
    if not examples:
        return messages
    by %= len(examples)
    turned = [message for example in examples[by:] + examples[:by] for message in example]
    return (messages[0], *turned, messages[-1])


def _varied(messages: tuple[dict[str, str], ...], repeat: int, attempt: int) -> tuple[dict[str, str], ...]:
    """The last message with a line for a repeat, and one for another attempt; the first is left as it is."""
    lines = []
    if repeat:
        lines.append(f"Write another one, number {repeat + 1}, about something else than the obvious.")
    if attempt:
        lines.append(
            f"Write it afresh, in the format of the examples and in other words (try {attempt + 1})."
        )
    if not lines:
        return messages
    last = messages[-1]
    return (*messages[:-1], {**last, "content": "\n".join([last["content"], "", *lines])})


class EndpointTeacher:
    """Asks an OpenAI-compatible endpoint."""

    def __init__(self, client: ChatClient, requests: Requests) -> None:
        self._client, self._requests = client, requests

    async def answer(self, task: Task, attempt: int) -> ChatAnswer:
        return await self._client.ask(self._requests.of(task, attempt))


class SymbolicTeacher:
    """The built-in teacher: no network, no cost, and exact about what the boxes say."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    async def answer(self, task: Task, attempt: int) -> ChatAnswer:
        text = symbolic_answer(task.kind, task.context, self._seed + task.repeat + 1000 * attempt)
        return ChatAnswer(text, "stop" if text else None, 0, 0, SYMBOLIC, 0.0)


class BatchTeacher:
    """Answers from the files of a batch API that have been read into the cache."""

    def __init__(self, cache: AnswerCache, requests: Requests) -> None:
        self._cache, self._requests = cache, requests

    async def answer(self, task: Task, attempt: int) -> ChatAnswer:
        known = self._cache.get(self._requests.of(task, attempt))
        if known is None:
            raise NotAnsweredYet(f"{task.task_id} waits for its batch")
        return known


def batch_lines(requests: Iterable[ChatRequest]) -> Iterator[str]:
    """Lines of a batch file, one request each, in the form of OpenAI's batch API."""
    for request in requests:
        line = {
            "custom_id": request.digest,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": request.body(),
        }
        yield json.dumps(line)


def read_batch_results(
    uri: str, find: Callable[[str], ChatRequest | None], cache: AnswerCache
) -> dict[str, int]:
    """Puts the answers of a result file into the cache; what is there already stays.

    Args:
        find: the request with this digest, or None if it is not one of this run.

    Returns:
        Counts: `read`, `known` before, `failed` (the API gave an error), `foreign` (of another run), `cut`
        (a last line that is not complete, as of a download that broke off).

    Raises:
        DataError: the file is missing, or a line is not in the API's form.
    """
    counts = {"read": 0, "known": 0, "failed": 0, "foreign": 0, "cut": 0}
    read: dict[str, tuple[ChatRequest, ChatAnswer]] = {}
    try:
        for digest, body in _results(uri):
            if digest is None:
                counts["cut"] += 1
            elif (request := find(digest)) is None:
                counts["foreign"] += 1
            elif digest in read or cache.get(request) is not None:
                counts["known"] += 1
            elif (answer := _answer_in(body, request)) is None:
                counts["failed"] += 1
            else:
                counts["read"] += 1
                read[digest] = request, answer
                if len(read) == _KEPT_AT_ONCE:
                    cache.put_now(read.values())
                    read.clear()
    finally:
        cache.put_now(read.values())
    return counts


def _results(uri: str) -> Iterator[tuple[str | None, Any]]:
    """custom_id and body of each line, see `_result`; None for a last one that is not complete."""
    with open_input(uri, "--batch-results") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                if line.endswith(b"\n"):
                    raise _not_a_result(uri, number, error) from error
                yield None, None
            else:
                yield _result(uri, number, row)


def _answer_in(body: Any, request: ChatRequest) -> ChatAnswer | None:
    """The answer in a completion's JSON; None where there is none."""
    try:
        return None if body is None else read_completion(body, request, 0.0)
    except PassingError:
        return None


def _result(uri: str, number: int, row: Any) -> tuple[str, Any]:
    """custom_id and the completion's JSON; None where the API tells of an error."""
    try:
        response = row.get("response") or {}
        good = row.get("error") is None and response.get("status_code") == 200
        return str(row["custom_id"]), response.get("body") if good else None
    except (TypeError, KeyError, AttributeError) as error:
        raise _not_a_result(uri, number, error) from error


def _not_a_result(uri: str, number: int, error: Exception) -> DataError:
    return DataError(
        f"{uri} line {number} is not a result of the batch API: {error!r}",
        "give the output file that the batch API made",
    )

"""Samples of one kind about one context, and attempts after a rejected one, by a teacher without chance."""

import asyncio
from collections import Counter
from pathlib import Path

from rayva.instruct.contexts import Context
from rayva.instruct.generator import Generator, Outcome
from rayva.instruct.prompts import PromptSet
from rayva.instruct.tasks import KINDS, Task, plan_tasks
from rayva.instruct.teachers import EndpointTeacher, Requests
from rayva.llm.client import ChatClient, Endpoint
from rayva.recipes.schema import Generation
from tests.llm.running import Running, teacher

SETTINGS = Generation(teacher="endpoint", model="m", temperature=0.0)
CONTEXTS = [Context(f"{n}", f"{n}.jpg", (f"Dog number {n} runs over the grass.",)) for n in range(20)]


def _generated(server: Running, tasks: list[Task]) -> list[Outcome]:
    async def run() -> list[Outcome]:
        async with ChatClient(Endpoint(server.base_url)) as client:
            asker = EndpointTeacher(client, Requests(SETTINGS, PromptSet.load()))
            generator = Generator(asker, SETTINGS.attempts, SETTINGS.seed)
            return await asyncio.gather(*map(generator.generate, tasks))

    return asyncio.run(run())


def test_repeats_are_other_samples_also_by_a_teacher_that_answers_by_the_last_message(tmp_path: Path) -> None:
    tasks = plan_tasks(CONTEXTS, (58, 23, 77), None, 0)
    assert any(task.repeat for task in tasks)
    with teacher(tmp_path, by_message=True) as server:
        outcomes = _generated(server, tasks)
        assert server.calls == len(tasks)
    assert Counter(outcome.status for outcome in outcomes) == {"accepted": len(tasks)}


def test_an_attempt_after_a_duplicate_is_another_sample(tmp_path: Path) -> None:
    alike = [Context(name, name, CONTEXTS[0].captions) for name in "ab"]
    with teacher(tmp_path, by_message=True) as server:
        outcomes = _generated(server, [Task("detail", 0, context) for context in alike])
    assert [outcome.status for outcome in outcomes] == ["accepted"] * 2
    reasons = sorted([attempt.reason for attempt in outcome.attempts] for outcome in outcomes)
    assert reasons == [[""], ["duplicate", ""]]


def test_first_requests_stay_what_they_were_so_that_paid_answers_stay_known() -> None:
    prompts = PromptSet.load()
    requests = Requests(SETTINGS, prompts)
    for kind in KINDS:
        request = requests.of(Task(kind, 0, CONTEXTS[0]))
        assert request.messages == prompts.messages(kind, CONTEXTS[0], kind != "conversation")

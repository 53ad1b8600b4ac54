"""Small plans of instruction generation for tests, carried out without Ray and without an endpoint."""

import asyncio
import json
from pathlib import Path
from typing import Any

from rayva.instruct.generator import Generator, Outcome
from rayva.instruct.teachers import BatchTeacher, Requests
from rayva.llm.cache import AnswerCache
from rayva.llm.prices import Price
from rayva.orchestration.generate import Work
from rayva.orchestration.generate_run import Plan, make_plan
from rayva.recipes import resolve
from rayva.storage import Storage


def batch_plan(folder: Path, captions: list[str], **settings: Any) -> Plan:
    """One description for each caption, by a batch API; a token costs a thousandth of a dollar."""
    rows = [{"id": f"i{n}", "image": f"i{n}.jpg", "captions": [text]} for n, text in enumerate(captions)]
    (folder / "contexts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prices.yaml").write_text("m: {prompt: 1000, completion: 1000}\n")
    given = {
        "teacher": "batch", "model": "m", "input": folder / "contexts.jsonl", "kinds": "[0,1,0]",
        "samples": len(captions), "prices": folder / "prices.yaml", **settings,
    }  # fmt: skip
    recipe = resolve("tiny", None, [f"generation.{key}={value}" for key, value in given.items()])
    return make_plan(recipe, Storage(str(folder / "storage")))


def outcomes_of(plan: Plan) -> dict[int, Outcome]:
    """What the actor would make of the answers that there are."""
    cache = AnswerCache(plan.storage)
    teacher = BatchTeacher(cache, Requests(plan.settings, plan.prompts))
    generator = Generator(teacher, plan.settings.attempts, plan.settings.seed)

    async def all_of_them() -> dict[int, Outcome]:
        return {number: await generator.generate(task) for number, task in enumerate(plan.tasks)}

    try:
        return asyncio.run(all_of_them())
    finally:
        cache.close()


def price_of(plan: Plan) -> Price:
    return Work(plan.settings, plan.storage).price()

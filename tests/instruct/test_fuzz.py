"""A thousand mutated answers: each is accepted or rejected with a reason, and can be written."""

import asyncio
import random
from collections import Counter

import pyarrow as pa

from rayva.data.schema import Instance
from rayva.instruct.contexts import Context
from rayva.instruct.generator import Generator, Outcome, judge
from rayva.instruct.parse import REASONS, Pair
from rayva.instruct.rules import RULES, Duplicates
from rayva.instruct.symbolic import symbolic_answer
from rayva.instruct.tasks import KINDS, Task
from rayva.llm.request import ChatAnswer, ChatRequest, read_completion

ANSWERS = 1000
PIECES = (
    "===", "\n===\n", "====", "Question:", "Answer:", "**Question 2:**", "\r\n", "\n\n", "\ud800", "\x00",
    "<image>", "[0.10, 0.20, 0.30, 0.40]", "the caption", "the bounding box", "I'm sorry", "\u202e", "\ufeff",
    "As an AI language model", "there are 7 dogs.", "There are \u0663 dogs.", "How many dogs are there?", "{",
)  # fmt: skip
CONTEXT = Context(
    "7",
    "7.jpg",
    ("A dog and two cats lie on a sofa.", "Pets rest at home."),
    (
        Instance("dog", (0.1, 0.1, 0.4, 0.5)),
        Instance("cat", (0.5, 0.1, 0.7, 0.5)),
        Instance("cat", (0.7, 0.2, 0.9, 0.6)),
    ),
)
ASKED = ChatRequest("m", ({"role": "user", "content": "q"},))


def mutated(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(0, 4)):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.randint(0, 40))
        text = rng.choice(
            (
                lambda t, a=start, b=end: t[:a] + t[b:],
                lambda t, a=start: t[:a] + rng.choice(PIECES) + t[a:],
                lambda t, a=start, b=end: t[:b] + t[a:b] * 3 + t[b:],
                lambda t, a=start: t[:a],
                lambda t, a=start: t[:a] + chr(rng.randrange(0x110000)) + t[a:],
                lambda t: t.replace("Question", "Answer", 1),
                lambda t: t.replace("===", "", 1),
            )
        )(text)
    return text


class Mutating:
    def __init__(self) -> None:
        self.rng = random.Random(5)

    async def answer(self, task: Task, attempt: int) -> ChatAnswer:
        text = mutated(symbolic_answer(task.kind, CONTEXT, task.repeat), self.rng)
        choice = {"message": {"content": text}, "finish_reason": self.rng.choice(("stop", "length", None))}
        return read_completion({"choices": [choice]}, ASKED, 0.0)


def test_every_answer_is_accepted_or_rejected_with_a_reason() -> None:
    tasks = [Task(KINDS[n % 3], n, CONTEXT) for n in range(ANSWERS)]
    generator = Generator(Mutating(), attempts=1, seed=0)

    async def run() -> list[Outcome]:
        return [await generator.generate(task) for task in tasks]

    outcomes = asyncio.run(run())
    known = REASONS | RULES.keys() | {"duplicate"}
    reasons: Counter[str] = Counter()
    for outcome in outcomes:
        [attempt] = outcome.attempts
        assert outcome.status == ("rejected" if attempt.reason else "accepted")
        assert bool(outcome.pairs) == (not attempt.reason)
        assert not attempt.reason or attempt.reason in known
        reasons[attempt.reason] += 1
        pa.table({"text": [attempt.answer.text], "detail": [attempt.detail]})
        for pair in outcome.pairs:
            pa.table({"q": [pair.question], "a": [pair.answer]})
            assert pair.question.strip()
            assert pair.answer.strip()
            assert "===" not in f"\n{pair.answer}\n".split("\n")
            assert "[0.10, 0.20" not in pair.answer
    assert len(reasons) >= 10, reasons
    assert reasons[""] > 20, reasons


def test_long_answers_that_fit_many_images_are_kept_only_from_the_symbolic_teacher() -> None:
    pairs = [
        Pair("What is there?", "A red square in the top left and a blue circle in the bottom right. " * 2)
    ]
    for across_images in (True, False):
        seen = Duplicates(across_images)
        assert seen.add(pairs, "a.jpg")
        assert seen.add(pairs, "b.jpg") is not across_images
        assert not seen.add(pairs, "a.jpg")


def test_a_refusal_is_told_as_such_though_it_is_in_no_format() -> None:
    for kind in KINDS:
        answer = ChatAnswer("I'm sorry, but I cannot help with that request.", "stop", 1, 1, "m", 0.0)
        pairs, attempt = judge(Task(kind, 0, CONTEXT), answer, seed=0)
        assert (pairs, attempt.reason) == ((), "refuses")

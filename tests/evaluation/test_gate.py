from __future__ import annotations

import pytest

from rayva.data.schema import Question
from rayva.evaluation.gate import decide
from rayva.evaluation.grounding import Ask, Condition
from rayva.evaluation.metrics import Answer, accuracies, grounding_figures, tally
from rayva.recipes.schema import Evaluation

RULES = Evaluation(min_accuracy=0.8, min_margin=0.2)


def figures(right: float, shuffled: float, none: float, questions: int = 100) -> dict[str, float]:
    return {
        "accuracy": right,
        "accuracy_shuffled_images": shuffled,
        "accuracy_no_image": none,
        "questions": questions,
    }


@pytest.mark.parametrize(
    ("right", "shuffled", "none", "passes", "says"),
    [
        (0.95, 0.3, 0.3, True, "looks"),
        (0.9, 0.7, 0.1, True, "20.0 points"),  # exactly the margin
        (0.8, 0.1, 0.1, True, "80.0%"),  # exactly the accuracy
        (0.79, 0.1, 0.1, False, "Only 79.0%"),
        (0.95, 0.8, 0.1, False, "another question's image"),
        (0.95, 0.1, 0.8, False, "without image"),
    ],
)
def test_the_gate(right: float, shuffled: float, none: float, passes: bool, says: str) -> None:
    decision = decide(figures(right, shuffled, none), RULES)
    assert decision.passed is passes
    assert says in decision.why


def test_nothing_asked_proves_nothing() -> None:
    decision = decide(figures(0.0, 0.0, 0.0, 0), Evaluation(min_accuracy=0.0, min_margin=0.0))
    assert not decision.passed


def answer(number: int, condition: Condition, text: str, task: str = "grounding") -> Answer:
    image = None if condition == "no_image" else f"i{number}"
    kind = "color" if number % 2 else "count"
    return Answer(
        Ask(Question(f"{task}{number}", f"i{number}", task, kind, "?", ("red",)), condition, image), text
    )


def test_only_the_grounding_task_feeds_the_gate() -> None:
    answers = [answer(n, "right_image", "red") for n in range(4)]
    answers += [answer(n, "shuffled_images", "red" if n else "blue") for n in range(4)]
    answers += [answer(n, "no_image", "blue") for n in range(4)]
    answers += [answer(n, "right_image", "blue", "names") for n in range(40)]
    found = grounding_figures(answers)
    assert (found["accuracy"], found["accuracy_shuffled_images"], found["accuracy_no_image"]) == (1, 0.75, 0)
    assert found["questions"] == 4
    assert accuracies(tally(answers, "task"))["names"] == {"right_image": 0.0, "questions": 40}
    kinds = accuracies(tally(answers[:12], "kind"))
    assert kinds["count"] == {"right_image": 1, "shuffled_images": 0.5, "no_image": 0, "questions": 2}
    assert kinds["color"]["shuffled_images"] == 1

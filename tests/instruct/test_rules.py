"""Quality rules: each finds what it is for, and leaves good answers alone."""

import json
import random
from typing import get_args

import pytest

from rayva.data import scenes
from rayva.data.schema import Instance
from rayva.instruct import contexts
from rayva.instruct.contexts import Context, Kind
from rayva.instruct.parse import Pair, parse
from rayva.instruct.rules import RULES, Duplicates, check, plural
from rayva.instruct.symbolic import symbolic_answer
from tests.reference import CAPTIONS_AND_BOXES, LLAVA_DATA, needs

KINDS: tuple[Kind, ...] = get_args(Kind)
BOX = (0.1, 0.1, 0.5, 0.5)
PARK = Context(
    "p",
    "p.jpg",
    ("Dogs play in a park near a man.", "A bench stands on the grass."),
    (
        *[Instance("dog", BOX)] * 2,
        Instance("person", BOX),
        Instance("bench", BOX),
        *[Instance("bird", BOX)] * 9,
    ),
)

BROKEN = [
    ("refuses", "What is it?", "I'm sorry, but I can't help with that request."),
    ("refuses", "What is it?", "I don't see any image here."),
    ("refuses", "What is it?", "As an AI language model, I have no eyes."),
    ("misses_image", "What is it?", "Please upload an image so that we can talk about it."),
    ("not_a_question", "???", "It is a dog."),
    ("mentions_caption", "What is it?", "According to the captions, it is a dog."),
    ("mentions_caption", "What is it?", "The second caption says that it is a dog."),
    ("mentions_bounding_box", "What is it?", "The bounding box of the dog is large."),
    ("mentions_bounding_box", "Where are the dog's coordinates?", "On the left."),
    ("leaks_coordinates", "Where is it?", "The dog is at [0.12, 0.25, 0.3, 0.4]."),
    ("leaks_coordinates", "Where is it?", "It begins at 0.372 from the left."),
    ("repeats_itself", "What is it?", "It is a dog " + "and a dog " * 6 + "."),
    ("repeats_itself", "What is it?", "The dog is very happy. " * 3),
    ("contradicts_count", "What is there?", "There are three dogs in the park."),
    ("contradicts_count", "What is there?", "There is one dog in the park."),
    ("contradicts_count", "How many dogs are there?", "Five."),
    ("contradicts_count", "How many dogs are there?", "I can count four dogs here."),
    ("contradicts_category", "Is there a bench in the image?", "No, there is nothing to sit on."),
    ("contradicts_category", "What is there?", "There are no dogs in the picture."),
]
FINE = [
    ("What is there?", "There are two dogs in the park."),
    ("What is there?", "There is one dog lying beside the bench."),
    ("What is there?", "There is one dog on the left, and another behind it."),
    ("How many dogs are wearing a collar?", "One."),
    ("How many birds are there?", "There are eight birds, and perhaps more."),
    ("How many people are there?", "There is one man."),
    ("Is there a cat in the image?", "No, there is no cat."),
    ("Is there a tree in the image?", "Yes, there is a tree."),
    ("What does the sign say?", "It names a price of 0.5 dollars."),
    ("Is the man sorry?", "He says that he is sorry, but he cannot see the dog."),
    ("How many legs does a dog have?", "Four legs, as dogs do."),
    ("Are there any cars in the scene?", "No, I don't see any cars in the scene."),
    ("What is it?", "Red"),
]


@pytest.mark.parametrize(("rule", "question", "answer"), BROKEN)
def test_each_rule_finds_its_fault(rule: str, question: str, answer: str) -> None:
    pairs = [Pair(question, answer)]
    assert RULES[rule]("conversation", pairs, PARK)
    assert check("conversation", pairs, PARK) is not None


@pytest.mark.parametrize(("question", "answer"), FINE)
def test_good_answers_are_left_alone(question: str, answer: str) -> None:
    assert check("conversation", [Pair(question, answer)], PARK) is None


def test_every_rule_has_a_case() -> None:
    assert {rule for rule, _, _ in BROKEN} | {"too_short"} == set(RULES)


def test_a_caption_outweighs_the_boxes() -> None:
    said = [Pair("What is there?", "There are three dogs.")]
    context = Context("p", "p.jpg", ("Three dogs run.",), PARK.instances)
    assert check("conversation", said, context) is None


def test_short_descriptions_are_refused() -> None:
    assert check("detail", [Pair("Describe it.", "Two dogs.")], PARK) == "too_short"
    assert check("reasoning", [Pair("Why?", "They play.")], PARK) == "too_short"


def test_a_question_asked_twice_is_a_loop() -> None:
    assert (
        check("conversation", [Pair("What is it?", "A dog."), Pair("What is it? ", "Dogs.")], PARK)
        == "repeats_itself"
    )


def test_duplicates() -> None:
    seen = Duplicates()
    short, long = Pair("What is it?", "A dog."), Pair("Why?", "Because " + "of the weather " * 8 + "today.")
    assert seen.add([short], "1.jpg")
    assert not seen.add([Pair("what is it", "a  dog")], "1.jpg")
    assert seen.add([short], "2.jpg")
    assert seen.add([long], "1.jpg")
    assert not seen.add([Pair("How so?", long.answer.upper())], "3.jpg")


@pytest.mark.parametrize("kind", KINDS)
def test_the_symbolic_teacher_is_accepted_on_scenes(kind: Kind) -> None:
    for context in contexts.from_images(r for _, r in scenes.generate("train", 300, 3)):
        assert isinstance(context, Context)
        raw = symbolic_answer(kind, context, 1)
        assert raw == symbolic_answer(kind, context, 1)
        pairs = parse(kind, raw, "stop")
        assert check(kind, pairs, context) is None, raw


@needs(LLAVA_DATA)
@pytest.mark.parametrize("kind", KINDS)
def test_the_symbolic_teacher_is_accepted_on_coco(kind: Kind) -> None:
    seen = Duplicates(across_images=False)
    for context in contexts.read_contexts(str(CAPTIONS_AND_BOXES)):
        assert isinstance(context, Context)
        for seed in range(5):
            pairs = parse(kind, symbolic_answer(kind, context, seed), "stop")
            assert check(kind, pairs, context) is None, pairs
        assert seen.add(pairs, context.image)


@needs(LLAVA_DATA)
def test_planted_miscounts_are_found_on_coco() -> None:
    """A wrong number is refused unless a caption has it; the right one never is."""
    rng, found, planted = random.Random(0), 0, 0
    for line in CAPTIONS_AND_BOXES.read_text().splitlines():
        row = json.loads(line)
        boxes = [i["category"] for i in row["instances"]]
        context = Context(
            row["id"], row["image"], tuple(row["captions"]), tuple(Instance(c, BOX) for c in boxes)
        )
        category = rng.choice(boxes or ["dog"])
        if not 1 <= boxes.count(category) <= 6:
            continue
        planted += 1
        wrong = [Pair("What is there?", f"There are 17 {plural(category)}.")]
        found += RULES["contradicts_count"]("conversation", wrong, context) is not None
    assert planted > 40
    assert found > 0.8 * planted


@needs(LLAVA_DATA)
def test_released_answers_break_no_rule() -> None:
    """90 answers of GPT-4 with the contexts that they were written from."""
    rows = [json.loads(line) for line in (LLAVA_DATA / "qa90_questions.jsonl").read_text().splitlines()]
    answers = [json.loads(line) for line in (LLAVA_DATA / "qa90_gpt4_answer.jsonl").read_text().splitlines()]
    asked = {row["question_id"]: row for row in rows}
    read = contexts.read_contexts(str(CAPTIONS_AND_BOXES))
    known = {c.image.rpartition("_")[2]: c for c in read if isinstance(c, Context)}
    kinds: dict[str, Kind] = {"conv": "conversation", "detail": "detail", "complex": "reasoning"}
    assert len(answers) == 90
    for answer in answers:
        row = asked[answer["question_id"]]
        context = known[row["image"].rpartition("_")[2]]
        assert check(kinds[row["category"]], [Pair(row["text"], answer["text"])], context) is None

"""Quality rules: each finds what it is for, and leaves good answers alone."""

import json
import random
from typing import get_args

import pytest

from rayva.data import scenes
from rayva.data.schema import Instance
from rayva.instruct import contexts
from rayva.instruct.contexts import Context, Kind
from rayva.instruct.contradictions import plural
from rayva.instruct.parse import Pair, parse
from rayva.instruct.rules import RULES, Duplicates, check
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
    ("refuses", "Why?", "I'm not able to describe this image because it violates our content policies."),
    ("refuses", "What is it?", "I cannot describe images of dogs that play."),
    ("refuses", "What is it?", "As an AI, I am not permitted to speak of dogs."),
    ("refuses", "What is it?", "Sorry, but this request about dogs must be declined."),
    ("refuses", "What is it?", "For reasons of safety, this request must be declined."),
    ("refuses", "What is it?", "I must decline to answer."),
    ("refuses", "What is it?", "I have to respectfully decline to answer."),
    ("misses_image", "What is it?", "Please upload an image so that we can talk about it."),
    ("refuses", "What is it?", "I'm an AI and have no eyes."),
    ("refuses", "What is it?", "Unfortunately, I won't be able to help with dogs."),
    ("refuses", "What is it?", "Unfortunately, I cannot answer that."),
    ("misses_image", "What is it?", "Could you share the picture with me?"),
    ("misses_image", "What is it?", "If you provide an image, it can be described."),
    ("misses_image", "What is it?", "Provide the image to get started."),
    ("replies_to_the_prompt", "Describe it.", "Sure! Here's a detailed description of it:\n\nTwo dogs play."),
    ("replies_to_the_prompt", "Describe it.", "**Here is the description you asked for:**\n\nTwo dogs play."),
    ("replies_to_the_prompt", "Why?", "The dogs are at play. Let me know if you need anything else!"),
    ("not_a_question", "???", "It is a dog."),
    ("mentions_caption", "What is it?", "According to the captions, it is a dog."),
    ("mentions_caption", "What is it?", "The second caption says that it is a dog."),
    ("mentions_caption", "What is it?", "Based on the descriptions, it is a dog."),
    ("mentions_caption", "What is it?", "From the information provided, it is a dog."),
    ("mentions_caption", "What is it?", "According to the sentences, two dogs play."),
    ("mentions_caption", "What is it?", "The descriptions mention a man and two dogs."),
    ("mentions_caption", "What is it?", "The first sentence says that dogs play."),
    ("mentions_caption", "What is it?", "The sentences don't mention a cat."),
    ("mentions_caption", "What is it?", "From the information provided to me, it is a dog."),
    ("mentions_bounding_box", "What is it?", "The bounding box of the dog is large."),
    ("mentions_bounding_box", "Where is it?", "The coordinates of the dog are on the left."),
    ("mentions_bounding_box", "Where is it?", "On the left, as its coordinates suggest."),
    ("mentions_bounding_box", "Where are the dog's coordinates?", "On the left."),
    ("leaks_coordinates", "Where is it?", "The dog is at [0.12, 0.25, 0.3, 0.4]."),
    ("leaks_coordinates", "Where is it?", "It begins at 0.372 from the left."),
    ("leaks_coordinates", "Where is it?", "The dog lies at 0.10, 0.12 and the bench is at 0.33, 0.45."),
    ("repeats_itself", "What is it?", "It is a dog " + "and a dog " * 6 + "."),
    ("repeats_itself", "What is it?", "The dog is very happy. " * 3),
    ("contradicts_count", "What is there?", "There are three dogs in the park."),
    ("contradicts_count", "What is there?", "There is one dog in the park."),
    ("contradicts_count", "How many dogs are there?", "Five."),
    ("contradicts_count", "How many dogs are there?", "I can count four dogs here."),
    ("contradicts_count", "How many dogs?", "Three."),
    ("contradicts_count", "How many dogs are in the picture?", "There are three."),
    ("contradicts_count", "How many dogs can you see in the image?", "I can see 3 dogs in the image."),
    ("contradicts_count", "How many dogs are visible in this photo?", "Exactly one."),
    ("contradicts_count", "How many dogs are there?", "None."),
    ("contradicts_count", "How many dogs does the picture show?", "Three: one is brown, two are black."),
    ("contradicts_count", "What is the number of dogs?", "Three."),
    ("contradicts_count", "What's the total number of dogs in the image?", "One."),
    ("contradicts_count", "What is there?", "The image features three dogs lying on the grass in a park."),
    ("contradicts_count", "What is there?", "In this picture, three dogs are at play."),
    ("contradicts_count", "What is there?", "There are three dogs lying on the grass."),
    ("contradicts_count", "What is there?", "I can see three dogs in the image."),
    ("contradicts_count", "What is there?", "Three dogs are lying on the grass."),
    ("contradicts_count", "What is there?", "It is a scene with three dogs lying on the grass."),
    ("contradicts_count", "What is there?", "In the photo we see 4 dogs with a man."),
    ("contradicts_category", "What is there?", "There is no dog in the picture, only an empty bench."),
    ("contradicts_category", "What is there?", "The picture does not contain any dogs; it is a park."),
    ("contradicts_category", "What is there?", "This image shows no dogs."),
    ("contradicts_category", "What is there?", "I don't see any dogs in the image."),
    ("contradicts_category", "Are there dogs?", "No."),
    ("contradicts_category", "Are there dogs in the picture?", "No, there are only cats."),
    ("contradicts_category", "Can you see dogs?", "None."),
    ("contradicts_category", "Does the image show a bench?", "No, it does not."),
    ("contradicts_category", "Is a person visible in the photo?", "No."),
    ("contradicts_category", "Are there any people?", "There aren\u2019t any."),
    ("contradicts_category", "What is there?", "It is a park. There isn't a bench here."),
    ("contradicts_category", "What is there?", "No people are visible in the image."),
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
    ("Why?", "They want to take a photo and share the picture with their friends."),
    ("What then?", "They could upload the photo to social media."),
    ("What then?", "If you visit the park, you can share the photo with friends."),
    ("Why?", "The dogs are not able to climb the tree, and the man declined to help, against the rules."),
    ("What for?", "There is information provided for tourists, given at the desk of the park."),
    ("Who decides?", "The owner of the park; this request may be denied."),
    ("What is on it?", "The given information on the sign is about a coordinated walk of dogs."),
    ("What is on it?", "The plaque provided information about the park."),
    ("How do they play?", "The players coordinate their movements, and one coordinates the team."),
    (
        "Why is it odd?",
        "The colors of the coat and the hat coordinate well, as the man coordinates his clothes.",
    ),
    ("What does it cost?", "Apples sell at 0.50, 0.75 or 0.90 dollars, and pears at 0.20, 0.30 euros."),
    ("What does it say?", "The description of the park on the board mentions dogs."),
    ("Is it easy?", "I cannot describe how happy the dogs look."),
    ("What do they choose?", "Based on the descriptions on the menu, they choose soup."),
    ("What helps?", "The information given by the signs helps people to find the way."),
    ("What is it?", "Sure enough, it is a dog: the question is whose."),
    ("Where is the bench?", "Here is the bench:\non the grass."),
    # Some of them, and what is like them in name only.
    ("How many dogs are in the water?", "One."),
    ("How many dogs have collars?", "One."),
    ("How many dogs are there on the left?", "One."),
    ("How many dogs are there?", "One dog is lying on the grass, another runs."),
    ("How many dogs are there?", "There are two: one dog is brown, one is black."),
    ("How many dogs are there?", "There are at least one dog and a man."),
    ("How many dogs are there?", "A couple."),
    ("How many dogs are there?", "A couple of dogs."),
    ("What is there?", "There are three dog bowls on the grass."),
    ("What is there?", "There is one dog house."),
    ("What is there?", "There are three hot dogs."),
    ("Why is it calm?", "If there are three dogs in a park, they may play; here it is only a pair of them."),
    ("How many hot dogs are there?", "Three."),
    ("How many ducks are there?", "Three."),
    ("What is there?", "The image features one dog lying on the grass, while the other one runs."),
    ("What is there?", "In this picture, one dog is at play and one is asleep."),
    ("What is there?", "In the picture, two dogs are at play."),
    ("What is there?", "There are three dogs painted on the wall."),
    ("What is there?", "The image shows three dogs on the shirt of the man."),
    ("What is there?", "There are three dog drawings on the bench."),
    ("What is the number of dogs on the bench?", "One."),
    ("What is the number of dogs?", "Two."),
    ("What is better than one dog?", "Three dogs are better than one."),
    ("What is there?", "Two dogs are lying on the grass."),
    ("What is there?", "There are no dogs in the image, only one seems to be close."),
    ("What is there?", "There are no dogs, cats or birds on the bench."),
    ("What is there?", "The picture does not show any dogs on a leash."),
    ("What is there?", "I don't see any dogs on the bench."),
    # Not in some place, not more, not in truth.
    ("Are there dogs on the bench?", "No."),
    ("Are there other dogs?", "No."),
    ("Are there benches in the picture?", "No, there is only one bench."),
    ("Are there people?", "No, just one man."),
    ("Is there a dog house?", "No."),
    ("What is there?", "There are no dogs in the image that wear a collar."),
    ("What is there?", "There are no people in the background."),
    ("What is there?", "There are no people visible behind the bench."),
    ("Why is it so?", "If there are no dogs in the picture, nobody runs."),
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
    assert {rule for rule, _, _ in BROKEN} | {"too_short", "nonsense"} == set(RULES)


def test_sentences_in_the_picture_may_be_spoken_of() -> None:
    said = [Pair("What is there?", "The first sentence says that dogs must be on a leash.")]
    assert check("conversation", said, PARK) == "mentions_caption"
    assert check("conversation", said, Context("p", "p.jpg", ("A sign in a park.",))) is None


def test_a_caption_outweighs_the_boxes() -> None:
    said = [Pair("What is there?", "There are three dogs.")]
    context = Context("p", "p.jpg", ("Three dogs run.",), PARK.instances)
    assert check("conversation", said, context) is None


@pytest.mark.parametrize(
    ("captions", "boxes", "crowds", "claim", "refused"),
    [
        ("A dog in a park.", ["dog"], [], "three dogs", True),
        ("Dogs in a park.", ["dog"], [], "three dogs", False),  # captions know of more than the boxes do
        ("Two dogs. Brown dogs play.", ["dog"], [], "three dogs", True),
        ("A dog in a park.", ["dog"], ["dog"], "three dogs", False),
        ("A herd of sheep.", ["sheep"] * 3, [], "eight sheep", False),
        ("Sheep stand in a field.", ["sheep"] * 3, [], "eight sheep", True),
        ("A crowd of people.", ["person"] * 4, [], "nine people", False),
        ("People on a street.", ["person"] * 4, ["person"], "nine people", False),
        ("People on a street.", ["person"] * 4, [], "nine people", True),
        ("A couple of people.", ["person"] * 4, [], "two people", False),
        ("A man walks with a tall woman.", ["person"] * 4, [], "two people", False),
        ("Fruit in a bowl.", ["banana"] * 2, [], "five bananas", False),  # boxed in bunches
        ("A shelf.", ["book"] * 3, [], "six books", False),
        ("A kite.", ["kite"], [], "three giraffes", False),  # not in the list
    ],
)
def test_boxes_count_only_what_they_are_sure_of(
    captions: str, boxes: list[str], crowds: list[str], claim: str, refused: bool
) -> None:
    context = Context("p", "p.jpg", (captions,), tuple(Instance(b, BOX) for b in boxes), tuple(crowds))
    number, noun = claim.split()
    for pair in (Pair("What is there?", f"There are {claim}."), Pair(f"How many {noun}?", f"{number}.")):
        assert (check("conversation", [pair], context) == "contradicts_count") == refused, pair


def test_a_crowd_is_there_and_a_caption_may_deny_it() -> None:
    said = [Pair("Are there people?", "No.")]
    crowd = Context("p", "p.jpg", ("A street.",), (), ("person",))
    assert check("conversation", said, crowd) == "contradicts_category"
    denied = Context("p", "p.jpg", ("A street without people.",), (), ("person",))
    assert check("conversation", said, denied) is None


def test_short_descriptions_are_refused() -> None:
    assert check("detail", [Pair("Describe it.", "Two dogs.")], PARK) == "too_short"
    assert check("reasoning", [Pair("Why?", "They play.")], PARK) == "too_short"


@pytest.mark.parametrize(
    "text",
    [
        "asdf qwer zxcv hjkl uiop bnm asdf2 qwer3 zxcv4 lkjh",
        "#### %%% 123 &&& lorem ipsum dolor sit amet consectetur adipiscing elit.",
        "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor ut labore.",
        "#### %%% 123 &&& 4 5 6 7 8 9 !!",
        '{"error": {"message": "The server had an error while it was asked for dogs in a park"}}',
        '[{"object": "a dog in a park", "where": "on the left, beside the man and the bench"}]',
        "<html><body>The dogs in the park are on the grass, and a man is near.</body></html>",
    ],
)
def test_nonsense_is_no_description(text: str) -> None:
    assert check("detail", [Pair("Describe it.", text)], PARK) == "nonsense"


@pytest.mark.parametrize(
    "text",
    [
        "Zwei Hunde spielen im Park auf dem Gras neben einer Bank.",
        "Deux chiens jouent dans un parc avec un homme sur un banc.",
        "Dos perros juegan en el parque con un hombre cerca de un banco.",
        "Dwa psy graja na trawie w parku obok duzej lawki.",
        "Dua ekor anjing bermain di taman dengan seorang pria yang duduk.",
        "Kaksi koiraa leikkii puistossa ja mies istuu penkilla heidan vieressaan.",
        "Dogs. Grass. Trees. Bench. Shade. Summer. Leaves. Happiness. Friendship.",
        "An animal runs through this meadow with great joy, tongue out, ears up.",
        "[Two dogs] play in the park, and {one man} looks on from a bench.",
    ],
)
def test_plain_words_of_any_language_are_no_nonsense(text: str) -> None:
    assert check("detail", [Pair("Describe it.", text)], PARK) is None


@pytest.mark.parametrize(
    ("question", "detail", "other"),
    [
        (
            "图中有什么",
            "两只狗在公园的草地上玩耍。旁边有一张长椅。",
            "天气很好。人们在公园里散步。狗在他们前面奔跑。",
        ),
        (
            "Что тут?",
            "Две собаки играют на траве в парке возле большой скамейки.",
            "Стоит хорошая погода, и все очень довольны этой прогулкой.",
        ),
    ],
    ids=["chinese", "russian"],
)
def test_other_scripts_have_words_too(question: str, detail: str, other: str) -> None:
    seen = Duplicates()
    for answer in (detail, other):
        assert check("detail", [Pair(question, answer)], PARK) is None
        assert seen.add([Pair(question, answer)], "1.jpg")
    assert not seen.add([Pair(question, other)], "1.jpg")
    assert check("detail", [Pair(question, detail[:5])], PARK) == "too_short"
    assert check("conversation", [Pair(question, detail), Pair(question, other)], PARK) == "repeats_itself"


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
        kind, said = kinds[row["category"]], answer["text"]
        written = said if kind == "detail" else f"Question:\n{row['text']}\n===\nAnswer:\n{said}"
        assert check(kind, parse(kind, written, "stop"), context) is None

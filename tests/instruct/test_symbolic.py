"""The symbolic teacher: three response types, reproducible, and true to the boxes."""

import random
import re
from dataclasses import replace

import pytest

from rayva.data import scenes
from rayva.data.places import PHRASES, place_name
from rayva.data.schema import IMAGE_PLACEHOLDER, ImageRecord, Instance
from rayva.instruct import scene_data, symbolic
from rayva.instruct.contexts import Context, Kind
from rayva.instruct.tasks import KINDS as INSTRUCT_KINDS
from rayva.recipes.schema import Data

KINDS: tuple[symbolic.ResponseType, ...] = ("conversation", "detail", "complex")
STREET = ImageRecord(
    image_id="street",
    split="train",
    captions=("A dog sits beside two bicycles.",),
    instances=(
        Instance("dog", (0.05, 0.6, 0.3, 0.95)),
        Instance("bicycle", (0.4, 0.1, 0.6, 0.3)),
        Instance("bicycle", (0.7, 0.1, 0.9, 0.3)),
    ),
)


@pytest.mark.parametrize("kind", KINDS)
def test_conversations_alternate_and_hold_one_image(kind: symbolic.ResponseType) -> None:
    for _, record in scenes.generate("train", 50, 0):
        turns = symbolic.respond(record, kind, seed=1)
        assert [t.role for t in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert sum(t.text.count(IMAGE_PLACEHOLDER) for t in turns) == 1
        assert turns[0].text.startswith(f"{IMAGE_PLACEHOLDER}\n")
        assert turns == symbolic.respond(record, kind, seed=1)


def test_answers_are_true_of_the_scene() -> None:
    """Reads the facts back out of the sentences and compares them with the drawn objects."""
    for scene, record in scenes.generate("train", 300, 4):
        by_color = {o.color: o for o in scene}
        for asked in symbolic.questions(record, random.Random(record.image_id), most=6):
            words = re.findall(r"[a-z]+", asked.answer.lower())
            if asked.kind == "color":
                assert by_color[words[-1]] in _asked_for(scene, words)
            elif asked.kind == "kind":
                assert words[-1] == by_color[words[1]].shape
            elif asked.kind == "size":
                assert words[-1] == by_color[words[1]].size
            elif asked.kind == "existence":
                things = {(o.color, o.shape) for o in scene} | {(o.color, "object") for o in scene}
                assert words[-1] == ("there" if (words[1], words[2]) in things else "missing")
            elif asked.kind == "count":
                sizes = [o.size for o in scene if o.size in words or not {"small", "large"} & set(words)]
                assert words[2] == symbolic.NUMBERS[len(sizes)]


def _asked_for(scene: scenes.Scene, words: list[str]) -> list[scenes.SceneObject]:
    if words[1] != "object":
        return [o for o in scene if o.shape == words[1]]
    return [o for o in scene if set(words) >= set(PHRASES[place_name(o.x, o.y)].split())]


def test_everything_is_described_once() -> None:
    for scene, record in scenes.generate("train", 50, 2):
        text = symbolic.detail(record, random.Random(0))
        assert all(text.count(f"{o.size} {o.color} {o.shape}") == 1 for o in scene)


def test_categories_of_photographs_work_too() -> None:
    asked = symbolic.questions(STREET, random.Random(0), most=20)
    answers = {q.question: q.answer for q in asked}
    assert answers["How many bicycles are there?"] == "There are two bicycles."
    assert answers["Where is the dog?"] == "The dog is in the bottom left."
    # Two bicycles cannot be told apart by name, so nothing is asked about "the bicycle".
    assert not any("the bicycle" in question for question in answers)
    assert symbolic.respond(STREET, "detail", 0)[1].text.count("bicycle") == 2


def test_without_boxes_there_is_nothing_to_ask() -> None:
    record = ImageRecord("bare", "train", captions=("Fog.",))
    assert symbolic.respond(record, "conversation", 0) == ()
    assert symbolic.respond(record, "complex", 0) == ()
    assert symbolic.respond(record, "detail", 0)[1].text == "Fog."


def test_the_dataset_trains_on_training_scenes_and_asks_about_test_scenes() -> None:
    data = Data(source="scenes", train_scenes=40, validation_scenes=5, test_scenes=20, samples_per_image=4)
    bundle = scene_data.build(data)
    split = {image.image_id: image.split for image in bundle.images}
    assert len(split) == 65
    trained = [image_id for s in (*bundle.pretrain, *bundle.finetune) for image_id in s.image_ids]
    assert {split[image_id] for image_id in trained} == {"train"}
    assert {split[question.image_id] for question in bundle.questions} == {"test"}
    assert {sample.kind for sample in bundle.finetune} == {"conversation", "detail", "complex"}
    ids = [sample.sample_id for sample in bundle.finetune]
    assert len(ids) == len(set(ids))
    assert list(bundle.finetune) == list(scene_data.build(data).finetune)


def _grouped(*categories: str) -> Context:
    boxes = tuple(Instance(name, (0.1 * n, 0.1, 0.1 * n + 0.05, 0.2)) for n, name in enumerate(categories, 1))
    return Context("c", "c.jpg", ("A scene.",), boxes)


def test_one_thing_is_not_spoken_of_in_the_plural() -> None:
    alone = _grouped("red circle")
    said = {symbolic.symbolic_answer(kind, alone, seed) for kind in INSTRUCT_KINDS for seed in range(40)}
    assert any("There is one object now" in text for text in said)
    assert not any(re.search(r"There (?:are one|is (?:two|three))|\bone \w+s\b", text) for text in said)


def test_things_alike_are_told_at_once_in_their_plural() -> None:
    text = symbolic.symbolic_answer("detail", _grouped("person", "person", "knife"), 0)
    assert "two small people in the top left" in text
    assert text.startswith("There are three objects: ")
    text = symbolic.symbolic_answer("conversation", _grouped("scissors"), 4)
    assert "There is one pair of scissors." in text
    assert "Where is the pair of scissors?" in text


@pytest.mark.parametrize("kind", INSTRUCT_KINDS)
def test_what_there_is_a_crowd_of_is_not_counted(kind: Kind) -> None:
    boxes = [(0.1 * n, 0.1, 0.1 * n + 0.05, 0.4) for n in range(4)]
    things = tuple(Instance("person" if n else "kite", box) for n, box in enumerate(boxes))
    crowd = Context("c", "c.jpg", ("Many people fly a kite.",), things, ("person",))
    nothing_else = replace(crowd, instances=things[1:])
    for seed in range(30):
        assert "person" not in (said := symbolic.symbolic_answer(kind, crowd, seed))
        assert "kite" in said or "object" in said
        assert "Many people fly a kite." in symbolic.symbolic_answer(kind, nothing_else, seed)

"""Drawn scenes: disjoint splits, reproducible, and pictures that show what the boxes say."""

import io
import random

import pytest
from PIL import Image

from rayva.data import scenes
from rayva.data.places import PHRASES, place_name

SPLITS = ("train", "validation", "test")


def combination(scene: scenes.Scene) -> tuple[tuple[object, ...], ...]:
    return tuple(sorted((o.shape, o.color, o.size, o.column, o.row) for o in scene))


def test_no_combination_of_objects_is_in_two_splits() -> None:
    found = {
        split: {combination(scene) for scene, _ in scenes.generate(split, 400, seed)}
        for seed, split in enumerate(SPLITS)
    }
    assert not found["train"] & found["test"]
    assert not found["train"] & found["validation"]
    assert not found["validation"] & found["test"]


def test_jitter_and_drawing_order_do_not_change_the_split() -> None:
    rng = random.Random(0)
    for scene, _ in scenes.generate("test", 30, 3):
        shuffled = list(scene)
        rng.shuffle(shuffled)
        assert scenes.scene_split(tuple(shuffled)) == "test"


def test_a_scene_depends_on_seed_split_and_index_alone() -> None:
    long = list(scenes.generate("train", 20, 5))
    assert list(scenes.generate("train", 7, 5)) == long[:7]
    assert list(scenes.generate("train", 20, 6)) != long


def test_each_object_can_be_named_by_its_colour() -> None:
    for scene, record in scenes.generate("train", 200, 1):
        assert len({o.color for o in scene}) == len(scene) == len(record.instances)
        assert all(0 <= value <= 1 for i in record.instances for value in i.bbox)


@pytest.mark.parametrize("supersample", [1, 2])
def test_the_last_drawn_object_shows_its_colour_at_its_centre(supersample: int) -> None:
    for scene, _ in scenes.generate("train", 60, 2):
        picture = scenes.render(scene, supersample=supersample)
        last = scene[-1]
        pixel = picture.getpixel((int(last.x * scenes.SIDE), int(last.y * scenes.SIDE)))
        assert pixel == scenes.COLORS[last.color]


def test_records_hold_the_picture_as_png() -> None:
    scene, record = next(scenes.generate("test", 1, 0))
    assert record.content is not None
    with Image.open(io.BytesIO(record.content)) as picture:
        assert picture.tobytes() == scenes.render(scene).tobytes()


def test_overlaps_occur() -> None:
    def overlap(a: scenes.SceneObject, b: scenes.SceneObject) -> bool:
        return (a.column, a.row) == (b.column, b.row)

    several = [s for s, _ in scenes.generate("train", 300, 0) if len(s) > 1]
    assert any(overlap(a, b) for s in several for i, a in enumerate(s) for b in s[i + 1 :])


def test_places_are_the_ninths_of_the_picture() -> None:
    centres = [(2 * column + 1) / 6 for column in range(3)]
    assert [place_name(x, y) for y in centres for x in centres] == list(PHRASES)
    assert place_name(1.0, 1.0) == "bottom right"

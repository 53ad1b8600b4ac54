"""Drawn scenes: pictures of coloured shapes with captions and boxes, made from a seed.

A scene is one to four objects, each with a shape, a colour, a size and a place on a 3x3 grid; some
overlap. The split of a scene is a hash of what is in it (jitter left out), so that no combination
of objects that is tested was ever trained on, whatever the seeds and numbers of scenes are.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw

from rayva.data.places import PHRASES, place_name
from rayva.data.schema import ImageRecord, Instance, Split

SHAPES = ("circle", "square", "triangle", "star")
COLORS = {
    "red": (214, 45, 48),
    "green": (44, 160, 60),
    "blue": (45, 90, 214),
    "yellow": (240, 205, 40),
    "purple": (140, 60, 180),
    "orange": (245, 135, 30),
}
SIDES = {"small": 0.22, "large": 0.31}
"""Side of an object's box as a share of the picture's side."""
BACKGROUND = (236, 236, 230)
JITTER = 0.02
SIDE = 96
"""Pixels."""


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One drawn object; `x`, `y` are its centre as shares of the picture's side."""

    shape: str
    color: str
    size: str
    column: int
    row: int
    x: float
    y: float

    @property
    def bbox(self) -> tuple[float, float, float, float]:
        """(x1, y1, x2, y2), normalised; an object at the edge reaches beyond [0, 1]."""
        half = SIDES[self.size] / 2
        return (self.x - half, self.y - half, self.x + half, self.y + half)


Scene = tuple[SceneObject, ...]
"""Objects in drawing order: later ones cover earlier ones."""


def scene_split(scene: Scene) -> Split:
    """90 % of all combinations are for training, 5 % for validation and 5 % for testing."""
    combination = sorted((o.shape, o.color, o.size, o.column, o.row) for o in scene)
    bucket = hashlib.sha256(repr(combination).encode()).digest()[0] % 20
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def _random_object(rng: random.Random, column: int, row: int) -> SceneObject:
    return SceneObject(
        shape=rng.choice(SHAPES),
        color=rng.choice(tuple(COLORS)),
        size=rng.choice(tuple(SIDES)),
        column=column,
        row=row,
        x=(2 * column + 1) / 6 + rng.uniform(-JITTER, JITTER),
        y=(2 * row + 1) / 6 + rng.uniform(-JITTER, JITTER),
    )


def _overlapping(rng: random.Random, other: SceneObject) -> SceneObject:
    """A small object that half covers a corner of `other`, in the same cell of the grid."""
    shift = 0.11
    dx, dy = rng.choice((-shift, shift)), rng.choice((-shift, shift))
    return SceneObject(
        shape=rng.choice(SHAPES),
        color=rng.choice([c for c in COLORS if c != other.color]),
        size="small",
        column=other.column,
        row=other.row,
        x=other.x + dx,
        y=other.y + dy,
    )


def is_valid(scene: Scene, split: Split) -> bool:
    """Whether `scene` is of `split`, and each of its objects has a colour of its own to be named by."""
    return len({o.color for o in scene}) == len(scene) and scene_split(scene) == split


def draw_scene(rng: random.Random, split: Split) -> Scene:
    """Draws scenes from `rng` until one belongs to `split`."""
    cells = list(itertools.product(range(3), range(3)))
    while True:
        count = rng.choices((1, 2, 3), weights=(4, 5, 1))[0]
        scene = [_random_object(rng, *cell) for cell in rng.sample(cells, count)]
        large = [o for o in scene if o.size == "large"]
        if large and rng.random() < 0.2:
            scene.append(_overlapping(rng, rng.choice(large)))
        if is_valid(tuple(scene), split):
            return tuple(scene)


def _outline(obj: SceneObject, side: int) -> list[tuple[float, float]]:
    x, y, r = obj.x * side, obj.y * side, SIDES[obj.size] * side / 2
    if obj.shape == "square":
        return [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
    if obj.shape == "triangle":
        return [(x, y - r), (x + r, y + r), (x - r, y + r)]
    radii = itertools.cycle((r * 1.1, r * 0.45))
    angles = (math.pi * k / 5 - math.pi / 2 for k in range(10))
    return [(x + q * math.cos(a), y + q * math.sin(a)) for q, a in zip(radii, angles, strict=False)]


def render(scene: Scene, side: int = SIDE, supersample: int = 2) -> Image.Image:
    """The scene as an RGB picture of `side` x `side` pixels, edges smoothed by `supersample`."""
    fine = side * supersample
    picture = Image.new("RGB", (fine, fine), BACKGROUND)
    pen = ImageDraw.Draw(picture)
    for obj in scene:
        color = COLORS[obj.color]
        if obj.shape == "circle":
            pen.ellipse([v * fine for v in obj.bbox], fill=color)
        else:
            pen.polygon(_outline(obj, fine), fill=color)
    return picture.reduce(supersample) if supersample > 1 else picture


def encode_png(picture: Image.Image) -> bytes:
    """PNG bytes; the lightest compression, since scenes are tiny and many."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def caption(scene: Scene, rng: random.Random) -> str:
    """One sentence that names every object with size, colour, shape and place, in random order."""
    parts = [f"a {o.size} {o.color} {o.shape} {PHRASES[place_name(o.x, o.y)]}" for o in scene]
    rng.shuffle(parts)
    return " and ".join(parts)


def to_record(scene: Scene, image_id: str, rng: random.Random, draw: bool = True) -> ImageRecord:
    """The scene with two captions and a box for each object; `draw=False` leaves out the pixels."""
    return ImageRecord(
        image_id=image_id,
        split=scene_split(scene),
        content=encode_png(render(scene)) if draw else None,
        captions=(caption(scene, rng), caption(scene, rng)),
        instances=tuple(Instance(f"{o.color} {o.shape}", _visible(o.bbox)) for o in scene),
    )


def _visible(bbox: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (min(1.0, max(0.0, value)) for value in bbox)
    return (x1, y1, x2, y2)


def generate(split: Split, count: int, seed: int) -> Iterator[tuple[Scene, ImageRecord]]:
    """`count` scenes of `split` with their records; scene i depends on (seed, split, i) alone."""
    for index in range(count):
        rng = random.Random(f"{seed}/{split}/{index}")
        scene = draw_scene(rng, split)
        yield scene, to_record(scene, f"scene-{split}-{index:06d}", rng)

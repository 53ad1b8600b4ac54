"""Contexts and prompt sets: every input form, bad rows, and the layout of prompt folders."""

import json
from pathlib import Path
from typing import get_args

import pytest

from rayva.data import scenes
from rayva.data.schema import ImageRecord, Instance
from rayva.errors import DataError
from rayva.instruct import contexts
from rayva.instruct.contexts import BadContext, Context, Kind
from rayva.instruct.parse import parse
from rayva.instruct.prompts import PromptSet
from rayva.instruct.rules import check
from tests.reference import CAPTIONS_AND_BOXES, LLAVA_DATA, ROOT, needs

KINDS: tuple[Kind, ...] = get_args(Kind)
DOG = Context("7", "7.jpg", ("A dog.", "One dog runs."), (Instance("dog", (0.1, 0.2, 0.5, 1.0)),))


def _lines(path: Path, *rows: object) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_jsonl_gives_contexts_and_names_bad_rows(tmp_path: Path) -> None:
    good = {
        "id": "a",
        "image": "a.jpg",
        "captions": ["A dog."],
        "instances": [{"category": "dog", "bbox": [0, 0, 0.5, 1]}],
    }
    path = _lines(
        tmp_path / "c.jsonl",
        good,
        "{broken",
        {**good, "id": "b", "captions": [" "]},
        {**good, "id": "c", "instances": [{"category": "dog", "bbox": [0.5, 0, 0.4, 1]}]},
        {**good, "id": "d", "captions": "A dog."},
        [1],
        {**good, "id": ["e"]},
        {**good, "id": 9, "instances": []},
    )
    read = list(contexts.read_contexts(path))
    usable = [r for r in read if isinstance(r, Context)]
    assert [c.id for c in usable] == ["a", "9"]
    assert usable[0] == Context("a", "a.jpg", ("A dog.",), (Instance("dog", (0.0, 0.0, 0.5, 1.0)),))
    reasons = [r.reason for r in read if isinstance(r, BadContext)]
    assert reasons == ["not_json", "no_caption", "bad_box", "malformed_row", "not_an_object", "bad_id"]


def test_coco_files_need_no_pictures(tmp_path: Path) -> None:
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 200, "height": 100} for n in (1, 2)]
    captions = _lines(
        tmp_path / "captions.json",
        {"images": images, "annotations": [{"image_id": 1, "caption": "A dog."}]},
    )
    instances = _lines(
        tmp_path / "instances.json",
        {
            "images": images,
            "categories": [{"id": 5, "name": "dog"}],
            "annotations": [
                {"image_id": 1, "category_id": 5, "bbox": [20, 10, 100, 50]},
                {"image_id": 1, "category_id": 5, "bbox": [0, 0, 200, 100], "iscrowd": 1},
                {"image_id": 1, "category_id": 5, "bbox": [20, 10, 1.03, 0.0]},
            ],
        },
    )
    good, bad = contexts.from_coco(captions, instances)
    assert isinstance(good, Context)
    assert good.instances == (Instance("dog", (0.1, 0.1, 0.6, 0.6)),)
    assert (good.crowds, good.empty_boxes) == (("dog",), 1)
    assert isinstance(bad, BadContext)
    assert bad.reason == "no_caption"


def test_built_in_images() -> None:
    records = [record for _, record in scenes.generate("train", 3, 0)]
    found = list(contexts.from_images([*records, ImageRecord("bare", "train")]))
    assert [c.id for c in found if isinstance(c, Context)] == [r.image_id for r in records]
    assert found[-1] == BadContext("bare", "no_caption", "bare has no caption")


def test_rendering() -> None:
    assert contexts.render(DOG, boxes=False) == "A dog.\nOne dog runs."
    assert contexts.render(DOG, boxes=True) == "A dog.\nOne dog runs.\n\ndog: [0.100, 0.200, 0.500, 1.000]"


@pytest.mark.parametrize("kind", KINDS)
def test_shipped_prompts_are_sound(kind: Kind) -> None:
    """The worked examples themselves are what parser and rules accept."""
    examples = _examples(PromptSet.load(), kind)
    assert len(examples) >= (2 if kind == "conversation" else 3)
    for shown, answer in examples:
        captions, _, boxes = shown.partition("\n\n")
        found = tuple(_instance(line) for line in boxes.splitlines())
        context = Context("x", "x.jpg", tuple(captions.splitlines()), found)
        assert contexts.render(context, boxes=bool(found)) == shown
        assert check(kind, parse(kind, answer, "stop"), context) is None


def _examples(prompts: PromptSet, kind: Kind) -> list[tuple[str, str]]:
    """What the examples show and answer."""
    said = [message["content"] for message in prompts.messages(kind, DOG, boxes=True)[1:-1]]
    return list(zip(said[::2], said[1::2], strict=True))


def _instance(line: str) -> Instance:
    category, _, box = line.partition(": ")
    x1, y1, x2, y2 = json.loads(box)
    return Instance(category, (x1, y1, x2, y2))


@pytest.mark.parametrize("kind", KINDS)
def test_messages_alternate_and_end_in_the_query(kind: Kind) -> None:
    loaded = PromptSet.load()
    messages = loaded.messages(kind, DOG, boxes=True)
    assert messages[0]["role"] == "system"
    roles = [m["role"] for m in messages[1:]]
    assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
    assert messages[-1]["content"] == contexts.render(DOG, boxes=True)
    assert len({loaded.digest(k) for k in KINDS}) == 3


def _digests(prompts: PromptSet) -> list[str]:
    return [prompts.digest(kind) for kind in KINDS]


def _copy(folder: Path) -> Path:
    for path in (ROOT / "platform/rayva/instruct/prompts").glob("*/*.txt"):
        target = folder / path.parent.name / path.name
        target.parent.mkdir(exist_ok=True, parents=True)
        target.write_bytes(path.read_bytes())
    return folder


def test_a_prompt_folder_is_read_and_every_word_counts(tmp_path: Path) -> None:
    folder = _copy(tmp_path)
    assert _digests(PromptSet.load(str(folder))) == _digests(PromptSet.load())
    (folder / "conversation" / "000_conv.txt").write_text("Question:\nWhy?\n===\nAnswer:\nSo.")
    assert PromptSet.load(str(folder)).digest("conversation") != PromptSet.load().digest("conversation")
    assert PromptSet.load(str(folder)).digest("detail") == PromptSet.load().digest("detail")


@pytest.mark.parametrize("name", ["conversation/system_message.txt", "detail_description/001_caps.txt"])
def test_a_missing_prompt_file_is_named(tmp_path: Path, name: str) -> None:
    (_copy(tmp_path) / name).unlink()
    with pytest.raises(DataError, match=name):
        PromptSet.load(str(tmp_path))


@needs(LLAVA_DATA)
def test_the_released_prompts_and_contexts_are_read() -> None:
    loaded = PromptSet.load(str(LLAVA_DATA / "prompts"))
    assert [len(_examples(loaded, k)) for k in KINDS] == [2, 3, 3]
    read = list(contexts.read_contexts(str(CAPTIONS_AND_BOXES)))
    assert len(read) == 80
    assert all(isinstance(c, Context) for c in read)


@needs(LLAVA_DATA)
@pytest.mark.parametrize("kind", KINDS)
def test_the_released_answers_are_accepted(kind: Kind) -> None:
    for shown, answer in _examples(PromptSet.load(str(LLAVA_DATA / "prompts")), kind):
        captions, _, boxes = shown.partition("\n\n")
        found = tuple(_instance(line) for line in boxes.splitlines())
        context = Context("x", "x.jpg", tuple(captions.splitlines()), found)
        assert check(kind, parse(kind, answer, None), context) is None, answer


def test_a_row_without_an_id_is_named_after_its_image(tmp_path: Path) -> None:
    path = tmp_path / "contexts.jsonl"
    rows = [
        {"id": None, "image": "a/7.jpg", "captions": ["A dog."]},
        {"image": "8.jpg", "captions": ["A cat."]},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    read = list(contexts.read_contexts(str(path)))
    assert [context.id for context in read if isinstance(context, Context)] == ["7", "8"]

"""COCO annotations become image records with normalised boxes."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayva.data.coco import normalise_box, read_box, read_caption_boxes, read_coco
from rayva.data.quarantine import BadRow
from rayva.data.schema import Instance
from rayva.errors import DataError
from tests.reference import CAPTIONS_AND_BOXES, needs


@pytest.fixture
def annotations(tmp_path):
    images = [
        {"id": 1, "file_name": "a.jpg", "width": 200, "height": 100},
        {"id": 2, "file_name": "gone.jpg", "width": 10, "height": 10},
        {"id": 3, "file_name": "mute.jpg", "width": 10, "height": 10},
    ]
    captions = [{"image_id": i, "caption": text} for i, text in ((1, "A cat. "), (2, "x"), (1, "Two cats"))]
    boxes = [
        {"image_id": 1, "category_id": 17, "bbox": [50, 25, 100, 50], "iscrowd": 0},
        {"image_id": 1, "category_id": 17, "bbox": [0, 0, 200, 100], "iscrowd": 1},
    ]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    categories = [{"id": 17, "name": "cat"}]
    (tmp_path / "instances.json").write_text(
        json.dumps({"images": images, "annotations": boxes, "categories": categories})
    )
    for name in ("a.jpg", "mute.jpg"):
        (tmp_path / name).write_bytes(b"picture")
    return tmp_path


def test_captions_and_boxes_are_joined(annotations):
    rejects = []
    files = (str(annotations / "captions.json"), str(annotations / "instances.json"))
    (record,) = read_coco(*files, str(annotations), "train", rejects)
    assert record.image_id == "a.jpg"
    assert record.uri == str(annotations / "a.jpg")
    assert record.captions == ("A cat.", "Two cats")
    assert record.instances == (Instance("cat", (0.25, 0.25, 0.75, 0.75)),)
    assert {(r.row_id, r.reason) for r in rejects} == {("2", "missing_image"), ("3", "no_caption")}


def test_boxes_are_optional(annotations):
    (record,) = read_coco(str(annotations / "captions.json"), None, str(annotations), "test", [])
    assert record.instances == ()
    assert record.split == "test"


def test_captions_that_are_no_text_and_sizes_that_only_the_boxes_have(annotations):
    captions = json.loads((annotations / "captions.json").read_text())
    captions["annotations"] += [{"image_id": 3, "caption": None}, {"image_id": 1, "caption": 7}]
    for image in captions["images"]:
        del image["width"], image["height"]
    (annotations / "captions.json").write_text(json.dumps(captions))
    rejects = []
    files = (str(annotations / "captions.json"), str(annotations / "instances.json"))
    (record,) = read_coco(*files, str(annotations), "train", rejects)
    assert record.captions == ("A cat.", "Two cats")
    assert record.instances == (Instance("cat", (0.25, 0.25, 0.75, 0.75)),)
    assert {(r.row_id, r.reason) for r in rejects} == {("2", "missing_image"), ("3", "no_caption")}


def test_boxes_in_pixels_are_no_normalised_ones():
    assert read_box([-0.01, 0, 1.002, 1]) == (0, 0, 1, 1)
    with pytest.raises(BadRow, match="pixels") as caught:
        read_box([0, 0, 120, 80])
    assert "from 0 to 1" in caught.value.detail


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"images": 3}', '{"images": [1], "annotations": []}', '{"images": [', "<html>"]
)
def test_another_file_is_a_clear_error(content, tmp_path):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(DataError, match=r"c\.json"):
        list(read_coco(str(tmp_path / "c.json"), None, str(tmp_path), "train", []))


@settings(deadline=None)
@given(st.lists(st.floats() | st.integers() | st.none() | st.text(), max_size=5), st.integers(), st.floats())
def test_a_box_is_inside_the_picture_or_refused(bbox, width, height):
    try:
        x1, y1, x2, y2 = normalise_box(bbox, width, height)
    except BadRow as error:
        refused = error.reason
    else:
        refused = "bad_box"
        assert 0 <= x1 < x2 <= 1
        assert 0 <= y1 < y2 <= 1
    assert refused == "bad_box"


def test_caption_box_lines_and_their_faults(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"picture")
    good = {
        "image": "a.jpg",
        "captions": ["A cat."],
        "instances": [{"category": "cat", "bbox": [0, 0, 0.5, 1]}],
    }
    rows = [
        good,
        [],
        {**good, "image": 3},
        {**good, "captions": "A cat."},
        {**good, "captions": []},
        {**good, "instances": [{"category": "cat", "bbox": [0, 0, 1]}]},
        {**good, "instances": [{"bbox": [0, 0, 1, 1]}]},
        {**good, "instances": [{"category": "cat", "bbox": [0.5, 0, 0.4, 1]}]},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rejects = []
    (record,) = read_caption_boxes(str(tmp_path / "rows.jsonl"), str(tmp_path), "train", rejects)
    assert record.instances == (Instance("cat", (0.0, 0.0, 0.5, 1.0)),)
    assert [r.reason for r in rejects] == [
        "not_an_object",
        "bad_image_field",
        "malformed_row",
        "no_caption",
        "bad_box",
        "unknown_category",
        "bad_box",
    ]


def test_boxes_without_an_area_are_left_out_and_told(tmp_path, annotations):
    """COCO has some; those wholly outside the picture refuse it."""
    (tmp_path / "a.jpg").write_bytes(b"picture")
    flat, good, crowd = ({"category": "cat", "bbox": [x, 0, 0.5, 1], **more}
                         for x, more in ((0.5, {}), (0, {}), (0, {"iscrowd": 1})))  # fmt: skip
    rows = [{"image": "a.jpg", "captions": ["A cat."], "instances": [flat, good, flat, crowd]}]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]))
    rejects = []
    [record] = read_caption_boxes(str(tmp_path / "rows.jsonl"), str(tmp_path), "train", rejects)
    assert record.instances == (Instance("cat", (0.0, 0.0, 0.5, 1.0)),)
    assert [(r.row_id, r.reason) for r in rejects] == [("row-0", "empty_box")]

    instances = json.loads((annotations / "instances.json").read_text())
    for box in ([296.65, 388.33, 1.03, 0.0], [10, 10, 0, 5]):
        instances["annotations"].append({"image_id": 1, "category_id": 17, "bbox": box, "iscrowd": 0})
    (annotations / "instances.json").write_text(json.dumps(instances))
    files = (str(annotations / "captions.json"), str(annotations / "instances.json"))
    rejects = []
    [record] = read_coco(*files, str(annotations), "train", rejects)
    assert len(record.instances) == 1
    assert ("1", "empty_box") in {(r.row_id, r.reason) for r in rejects}
    with pytest.raises(BadRow, match="inside"):
        normalise_box([300, 10, 20, 20], 200, 100)


@needs(CAPTIONS_AND_BOXES)
def test_real_captions_and_boxes_of_coco():
    rejects = []
    records = list(read_caption_boxes(str(CAPTIONS_AND_BOXES), "memory://images", "test", rejects))
    assert len(records) == 80
    assert rejects == []
    assert {len(r.captions) for r in records} == {5, 6}
    assert 5.9 < sum(len(r.instances) for r in records) / 80 < 6.0

"""Names of images: one file on a disk is one image, however rows spell its name."""

import json

import pytest

from rayva.data.llava_json import build
from rayva.data.locations import ImageFolder
from rayva.recipes.schema import Data

ASKED = [{"from": "human", "value": "<image>\nIs it a cat?"}, {"from": "gpt", "value": "Yes"}]


@pytest.mark.parametrize("spelt", ["./sub/a.png", "sub//a.png", "sub/./a.png"])
def test_one_file_spelt_in_two_ways_is_one_image_on_one_side(spelt, tmp_path):
    (tmp_path / "sub").mkdir()
    for number in range(40):
        (tmp_path / "sub" / f"a{number}.png").write_bytes(b"")
    names = [f"sub/a{number}.png" for number in range(40)]
    other = [spelt.replace("a.png", f"a{number}.png") for number in range(40)]
    for file, given_names in (("pretrain", names), ("finetune", other)):
        rows = [{"id": n, "image": n, "conversations": ASKED} for n in given_names]
        (tmp_path / f"{file}.json").write_text(json.dumps(rows))
    bundle = build(
        Data(
            source="llava",
            pretrain_json=str(tmp_path / "pretrain.json"),
            finetune_json=str(tmp_path / "finetune.json"),
            test_fraction=0.3,
        )
    )
    trained = {
        image for part in (bundle.pretrain, bundle.finetune) for one in part for image in one.image_ids
    }
    assert {image.image_id for image in bundle.images} == set(names)
    assert trained.isdisjoint(question.image_id for question in bundle.questions)
    assert 0 < len(trained) < 40


def test_an_object_stores_keys_are_not_respelt():
    folder = ImageFolder("s3://bucket/images")
    assert folder.plain("a//b.png") == "a//b.png"
    assert folder.plain("./b.png") == "b.png"
    assert ImageFolder("images").plain("s3://bucket/a//b.png") == "s3://bucket/a//b.png"

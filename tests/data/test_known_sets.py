"""Files in the forms of LLaVA's published sets load unchanged; the wording is our own."""

import gzip
import json
from collections import Counter

import pytest

from rayva.data.llava_json import build
from rayva.data.quarantine import count_reasons
from rayva.recipes.schema import Data


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


# Stage 1: one caption a row, the mark before or after the request, images in numbered folders.
LCS_558K = [
    {
        "id": "002239345",
        "image": "00223/002239345.jpg",
        "conversations": [human("Name what is shown.\n<image>"), gpt("a red kettle on a blue stove")],
    },
    {
        "id": "005947502",
        "image": "00594/005947502.jpg",
        "conversations": [human("<image>\nCaption this."), gpt("two boats , seen from the pier")],
    },
]
# Stage 2, 2023 April to July: COCO's file names without a folder; ids are repeated.
INSTRUCT_158K = [
    {
        "id": "000000033471",
        "image": "000000033471.jpg",
        "conversations": [
            *(human("<image>\nHow many buses are there?"), gpt("There is one bus.")),
            *(human("Is it moving?"), gpt("No, it stands at the kerb.")),
        ],
    },
    {
        "id": "000000033471",
        "image": "000000033471.jpg",
        "conversations": [human("Think about why the bus waits.\n<image>"), gpt("Passengers are boarding.")],
    },
]
# LLaVA-1.5: several image folders, numbers as ids, text-only rows with other keys, region boxes.
MIX_665K = [
    {
        "id": "000000033471",
        "image": "coco/train2017/000000033471.jpg",
        "conversations": [human("<image>\nIs the kerb wet?\nAnswer with one word."), gpt("No")],
    },
    {
        "id": 1160009,
        "image": "vg/VG_100K_2/2404.jpg",
        "conversations": [
            *(human("<image>\nGive the box of: the left lamp"), gpt("[0.11, 0.05, 0.32, 0.6]")),
            *(human("Describe the box [0.2, 0.2, 0.4, 0.9]."), gpt("a tall door")),
        ],
    },
    {
        "id": "ocr",
        "image": "ocr_vqa/images/0452264464.jpg",
        "conversations": [human("<image>\nWho wrote this?"), gpt("N. N.")],
    },
    {
        "id": "gone",
        "image": "textvqa/train_images/gone.jpg",
        "conversations": [human("<image>\nRead it."), gpt("Exit")],
    },
    {
        "id": "wK3hoLT_0",
        "model": "",
        "conversations": [
            *(human("Write a loop that prints </s> three times"), gpt("for _ in range(3):\n\tprint('</s>')")),
            *(human("Now with <image> tags, and ###"), gpt("")),
            human("thanks"),
        ],
    },
    {"id": "wK3hoLT_5", "model": "gpt-4", "conversations": [gpt("Go on."), human("Why?"), gpt("Because.")]},
]
# ScienceQA conversions: image null or absent for text problems, one folder for each problem.
SCIENCEQA_LEPA = [
    {
        "id": "4",
        "image": None,
        "conversations": [
            human("Question: Which is a solid?\nContext: N/A\nOptions: (A) ice (B) rain\n"),
            gpt("LECTURE: Solids keep their shape.\nSOLUTION: Ice does.\n###\nANSWER: A."),
        ],
    },
    {
        "id": "11",
        "image": "11/image.png",
        "conversations": [
            human("Question: Where is north?\nContext: See the map.\nOptions: (A) up (B) down\n\n<image>"),
            gpt("SOLUTION: Maps show north on top.\n###\nANSWER: A."),
        ],
    },
]
SCIENCEQA_LEA = [
    {
        "id": "4",
        "conversations": [human("Which is a solid?\nN/A\n(A) ice (B) rain"), gpt("Ice is. The answer is A.")],
    },
    {
        "id": "11",
        "image": "11/image.png",
        "conversations": [human("Where is north?\n<image>"), gpt("The answer is A.")],
    },
]
# Several images in one row.
INTERLEAVED = [
    {
        "id": "pair",
        "image": ["00223/002239345.jpg", "11/image.png"],
        "conversations": [human("<image>\n<image>\nWhat differs?"), gpt("The kettle is gone.")],
    },
    {
        "id": "later",
        "image": ["00223/002239345.jpg", "11/image.png"],
        "conversations": [
            human("<image>\nWhat is it?"),
            gpt("A kettle."),
            human("And <image>?"),
            gpt("A map."),
        ],
    },
]
SETS = {
    "lcs_558k": LCS_558K,
    "instruct_158k": INSTRUCT_158K,
    "mix_665k": MIX_665K,
    "scienceqa_lepa": SCIENCEQA_LEPA,
    "scienceqa_lea": SCIENCEQA_LEA,
    "interleaved": INTERLEAVED,
}


def images_of(row):
    image = row.get("image")
    return image if isinstance(image, list) else [image] if image else []


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    for name in {name for rows in SETS.values() for row in rows for name in images_of(row)}:
        if "gone" not in name:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"picture")
    return folder


def as_lines(rows):
    return "\n".join(json.dumps(row) for row in rows).encode()


@pytest.mark.parametrize("name", list(SETS))
@pytest.mark.parametrize("form", ["json", "jsonl", "json.gz"])
def test_every_row_with_its_images_loads_unchanged(name, form, images, tmp_path):
    rows = SETS[name]
    content = as_lines(rows) if form == "jsonl" else json.dumps(rows, indent=2).encode()
    path = tmp_path / f"{name}.{form}"
    path.write_bytes(gzip.compress(content) if form == "json.gz" else content)
    data = Data(
        pretrain_json=str(path),
        finetune_json=str(path),
        pretrain_images=str(images),
        finetune_images=str(images),
        test_fraction=0.0,
    )
    bundle = build(data)
    wanted = [row for row in rows if row["id"] != "gone"]
    samples = list(bundle.finetune)
    assert [[{"from": turn.role, "value": turn.text} for turn in sample.turns] for sample in samples] == [
        row["conversations"] for row in wanted
    ]
    assert [list(sample.image_ids) for sample in samples] == [images_of(row) for row in wanted]
    assert [sample.sample_id.split("#")[0] for sample in samples] == [str(row["id"]) for row in wanted]
    missing = Counter({"missing_image": len(rows) - len(wanted)})
    assert Counter(count_reasons(bundle.rejected)) == +missing
    assert {image.image_id for image in bundle.images} == {i for row in wanted for i in images_of(row)}

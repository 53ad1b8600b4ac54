"""Emoji: the packages' words and pictures are joined by code point, and concepts are held out."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from rayva.data import emoji
from rayva.data.emoji import FLUENT, GROUPS, NOTO, WORDS, build, read_concepts
from rayva.data.general_knowledge import text_pairs, text_questions
from rayva.data.schema import IMAGE_PLACEHOLDER
from rayva.errors import DataError, RecipeError
from rayva.recipes.schema import Data

ASSETS = Path(os.environ.get("RAYVA_SMOL_ASSETS", Path(__file__).parents[2] / "runs" / "smol-assets"))


def entry(code, label, group, tags=("alpha", "beta", "gamma")):
    return {"hexcode": code, "label": label, "group": group, "tags": list(tags)}


def put(folder, words, fluent, noto):
    (folder / WORDS).parent.mkdir(parents=True)
    (folder / WORDS).write_text(json.dumps(words))
    for base, suffix, codes in ((FLUENT, "webp", fluent), (NOTO, "png", noto)):
        (folder / base).mkdir(parents=True)
        for code in codes:
            (folder / base / f"{code}.{suffix}").write_bytes(f"{base}/{code}".encode())
    return folder


@pytest.fixture
def packages(tmp_path):
    """200 concepts that can be used, and one of each kind that cannot."""
    codes = [f"1F{n:03X}" for n in range(200)]
    words = [entry(code, f"thing {n}", tuple(GROUPS)[n % 8]) for n, code in enumerate(codes)]
    words += [
        entry("1F1E6-1F1E8", "flag: Ascension Island", 9),
        entry("1F3FB", "light skin tone", 2),
        {"hexcode": "1F1E6", "label": "regional indicator A", "tags": []},
        entry("1F4CE", "paperclip", 7),
        entry("1F587-FE0F", "linked paperclips", 7),
        entry("1F468-200D-1F4BB", "man technologist", 1),
        entry("1F3AE", "video game", 6),
        entry("1FFFF", "drawn by nobody", 7),
        entry("2764-FE0F", "red heart", 0, ["heart", "love", "1432", "✓", "emotion"]),
        entry("1F45F", "man\u2019s shoe", 7, []),
    ]
    names = [w["hexcode"].lower() for w in words if w["hexcode"] != "1FFFF"]
    return put(tmp_path, words, [*names, "1f44b-1f3fb"], [n for n in names if n != "1f45f"])


def tables_of(folder, **more):
    return build(Data(source="emoji", emoji_dir=str(folder), **more))


def test_concepts_are_joined_and_the_unusable_left_out(packages):
    concepts = {c.label: c for c in read_concepts(packages)}
    assert len(concepts) == 202
    heart = concepts["red heart"]
    assert (heart.code, heart.group, heart.tags) == ("2764", "smileys and emotion", ("love", "emotion"))
    assert heart.fluent.name == "2764-fe0f.webp"
    assert heart.noto
    assert heart.noto.name == "2764-fe0f.png"
    assert concepts["man's shoe"].noto is None
    assert not any("paperclip" in label or "flag" in label for label in concepts)


def test_held_out_concepts_are_never_trained_on(packages):
    bundle = tables_of(packages, test_fraction=0.2, samples_per_image=2)
    images = {i.image_id: i for i in bundle.images}
    assert len(images) == len(bundle.images)
    trained = {i for s in (*bundle.pretrain, *bundle.finetune) for i in s.image_ids}
    asked = {q.image_id for q in bundle.questions if q.task == "grounding"}
    assert asked
    assert not {i.removeprefix("fluent/") for i in trained} & {i.removeprefix("fluent/") for i in asked}
    assert all(images[i].split == "train" for i in trained)
    assert all(images[i].split == "test" for i in asked)
    assert len(trained) + len(asked) == 202
    assert all(i.content for i in images.values())


def test_questions_of_each_task(packages):
    bundle = tables_of(packages, test_fraction=0.2)
    images = {i.image_id: i for i in bundle.images}
    by_task = {}
    for question in bundle.questions:
        by_task.setdefault(question.task, []).append(question)
    assert by_task.keys() == {"grounding", "group_noto", "group_noto_seen", "name_seen", "text"}
    assert all(q.accepted[0] in GROUPS.values() for q in by_task["grounding"])
    held_out = {q.image_id.split("/")[1] for q in by_task["grounding"]}
    assert {q.image_id.split("/")[1] for q in by_task["group_noto"]} <= held_out
    assert not {q.image_id.split("/")[1] for q in by_task["group_noto_seen"]} & held_out
    for question in (*by_task["group_noto"], *by_task["group_noto_seen"]):
        assert images[question.image_id].content.decode().startswith(NOTO)
    for question in by_task["name_seen"]:
        assert question.accepted == images[question.image_id].captions
    assert all(q.image_id == "" for q in by_task["text"])
    assert by_task["text"][0].accepted[0] == "Paris"
    assert len({q.question_id for q in bundle.questions}) == len(bundle.questions)


def test_what_the_gate_asks_is_what_training_asks_first(packages):
    samples = [s for s in tables_of(packages, samples_per_image=2).finetune if s.image_ids]
    first = Counter(s.turns[0].text.removeprefix(f"{IMAGE_PLACEHOLDER}\n") for s in samples)
    assert first.keys() == set(emoji.NAME_QUESTIONS) | set(emoji.GROUP_QUESTIONS)
    assert abs(sum(first[q] for q in emoji.NAME_QUESTIONS) - len(samples) / 2) <= 1
    for sample in samples:
        assert sum(t.text.count(IMAGE_PLACEHOLDER) for t in sample.turns) == 1
        assert len({t.text for t in sample.turns[::2]}) == len(sample.turns) // 2


def test_the_same_settings_give_the_same_tables(packages):
    assert tables_of(packages, seed=3) == tables_of(packages, seed=3)
    assert tables_of(packages, seed=3).finetune != tables_of(packages, seed=4).finetune


def test_general_knowledge_does_not_give_away_the_held_out_questions():
    questions = [question for question, _ in text_pairs()]
    assert len(set(questions)) == len(questions) > 100
    held_out = list(text_questions())
    assert not {q.question for q in held_out} & set(questions)
    for question in held_out:
        assert not any(question.accepted[0].lower() in a.lower() for _, a in text_pairs()
                       if question.kind == "capital")  # fmt: skip


def test_missing_packages_are_a_clear_error(tmp_path):
    with pytest.raises(RecipeError, match=r"emoji_dir is not set"):
        build(Data(source="emoji"))
    with pytest.raises(DataError, match=r"fluent-emoji-3d.*no pictures[\s\S]*fetch_smol"):
        tables_of(tmp_path)
    put(tmp_path / "x", [entry("1F600", "grinning face", 0)], ["1f601"], ["1f601"])
    with pytest.raises(DataError, match="nothing in common"):
        tables_of(tmp_path / "x")
    for content in ("{", "{}", '[{"label": "x"}]'):
        (tmp_path / "x" / WORDS).write_text(content)
        with pytest.raises(DataError, match=r"data\.json cannot be used"):
            tables_of(tmp_path / "x")


@pytest.mark.skipif(not (ASSETS / "emoji").exists(), reason="needs `python pipelines/fetch_smol.py`")
def test_the_real_packages():
    concepts = read_concepts(ASSETS / "emoji")
    assert len(concepts) == 1593
    assert all(c.noto for c in concepts)
    assert {c.group for c in concepts} == set(GROUPS.values())
    assert len({c.label for c in concepts}) == len(concepts)
    assert max(Counter(c.group for c in concepts).values()) / len(concepts) < 0.235

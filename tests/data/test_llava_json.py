"""LLaVA JSON: every bad row is quarantined with its reason, everything else loads unchanged."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayva.data.llava_json import build, parse_row
from rayva.data.quarantine import BadRow, count_reasons
from rayva.data.schema import IMAGE_PLACEHOLDER, Turn
from rayva.data.splits import held_out
from rayva.errors import DataError, RecipeError
from rayva.recipes.schema import Data
from tests.reference import TEMPLATES, needs


def chat(*texts, image=None, **more):
    roles = ("human", "gpt")
    row = {"conversations": [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)], **more}
    return {**row, "image": image} if image is not None else row


def turn(role, value):
    return {"from": role, "value": value}


BAD_ROWS = {
    "not_an_object": ["text", 7, None, ["a"]],
    "no_conversations": [{}, {"image": "a.png"}, {"conversations": []}, {"conversations": "hello"}],
    "malformed_turn": [
        {"conversations": ["hello"]},
        {"conversations": [{"from": "human"}]},
        {"conversations": [turn("human", None), turn("gpt", "a")]},
        {"conversations": [turn("human", ["q"]), turn("gpt", "a")]},
    ],
    "unknown_role": [
        {"conversations": [turn("system", "q"), turn("gpt", "a")]},
        {"conversations": [turn(None, "q"), turn("gpt", "a")]},
        {"conversations": [turn(["human"], "q"), turn("gpt", "a")]},
    ],
    "roles_do_not_alternate": [
        {"conversations": [turn("human", "q"), turn("human", "q"), turn("gpt", "a")]},
        {"conversations": [turn("human", "q"), turn("gpt", "a"), turn("gpt", "a")]},
    ],
    "no_answer": [
        chat("q"),
        {"conversations": [turn("gpt", "a")]},
        {"conversations": [turn("gpt", "a"), turn("human", "q")]},
    ],
    "invalid_text": [chat("\ud800", "a"), chat("q", "a\udfff"), chat("q", "a", image="\udc00.png")],
    "bad_image_field": [chat("q", "a", image=7), chat("q", "a", image=[None]), chat("q", "a", image={})],
    "more_images_in_text_than_given": [
        chat("<image><image>", "a", "<image>", "b", images=["a.png"]),
        chat("<image>\nq", "a", "<image> and this?", "b", image="a.png"),
        chat("<image>\n" * 3, "a", image=["a.png", "b.png"]),
        chat("<image><image>\nq", "a", "<image> and this?", "b", image="a.png"),
    ],
    "more_images_given_than_in_text": [chat("<image>\nq", "a", image=["a.png", "b.png"])],
}


@pytest.mark.parametrize(
    ("reason", "row"), [(reason, row) for reason, rows in BAD_ROWS.items() for row in rows]
)
def test_a_bad_row_has_its_reason(reason, row):
    with pytest.raises(BadRow) as caught:
        parse_row(row)
    assert caught.value.reason == reason


def test_good_rows_keep_every_word():
    row = parse_row(chat("<image>\nWhat?", "This.", "Why?", "So.", image="a/b.png", id=12))
    assert row.row_id == "12"
    assert row.images == ("a/b.png",)
    assert row.turns == (
        Turn("human", "<image>\nWhat?"),
        Turn("gpt", "This."),
        Turn("human", "Why?"),
        Turn("gpt", "So."),
    )


@pytest.mark.parametrize(
    ("row", "images"),
    [
        (chat("Is <image> a token?", "Here it is text."), ()),
        (chat("q", "a", image=""), ()),
        (chat("q", "a", image=[]), ()),
        (chat("no marker", "a", image=["a.png", "b.png"]), ("a.png", "b.png")),
        (chat("<image>", "An answer with <image> in it.", image="a.png"), ("a.png",)),
        (chat("<image> <image>", "a", image=["a.png", "b.png"]), ("a.png", "b.png")),
        ({"id": None, **chat("q", "a", model="gpt-4")}, ()),
        (chat("<image>", "a", images=["a.png"]), ("a.png",)),
        (chat("q", "a", image="", images=["a.png", "b.png"]), ("a.png", "b.png")),
        (chat("<image>", "a", image="a.png", images=["b.png", "c.png"]), ("a.png",)),
        (chat("q", "a", images=3), ()),
    ],
)
def test_forms_that_real_files_have_are_accepted(row, images):
    assert parse_row(row).images == images


@pytest.mark.parametrize(
    "texts",
    [
        [("gpt", "Hi"), ("human", "q"), ("gpt", "a"), ("human", "q2")],
        [("human", "q"), ("gpt", "")],
        [("human", "q"), ("gpt", " \n"), ("human", ""), ("gpt", "a")],
        [("human", ""), ("gpt", "  padded  ")],
        [("human", "USER: q ASSISTANT: </s>###"), ("gpt", "[INST] <s> <image> </s> ASSISTANT: ")],
        [("human", "q\0\t"), ("gpt", "\u56fe\U0001f642\u0301\ufeff")],
    ],
)
def test_no_row_is_refused_for_what_is_said_in_it(texts):
    row = {"conversations": [turn(role, text) for role, text in texts]}
    assert parse_row(row).turns == tuple(Turn(role, text) for role, text in texts)


def test_repeated_marks_of_a_turn_count_once_if_there_are_too_many():
    row = chat("<image>\n<image>\nCompare.", "a", "Sure?", "<image><image>", image="a.png")
    assert [t.text for t in parse_row(row).turns] == ["<image>\n\nCompare.", "a", "Sure?", "<image><image>"]
    enough = chat("<image>\n<image>\nCompare.", "a", image=["a.png", "b.png"])
    assert parse_row(enough).turns[0].text == "<image>\n<image>\nCompare."


@needs(TEMPLATES)
def test_conversations_made_for_the_original_load_or_have_a_reason():
    rows = json.loads((TEMPLATES / "conversations.json").read_text())
    refused = Counter()
    for row in rows:
        try:
            parse_row(row)
        except BadRow as error:
            refused[error.reason] += 1
    # One file name, but a mark in each of two turns: the original fails in training.
    assert refused == {"more_images_in_text_than_given": 1}


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("<image>"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
turns = st.fixed_dictionaries(
    {},
    optional={
        "from": st.sampled_from(["human", "gpt", "system"]) | anything,
        "value": st.sampled_from(["<image>\nq", "a", "", "\ud800"]) | anything,
    },
)
row_like = st.fixed_dictionaries(
    {},
    optional={
        "id": anything,
        "image": st.sampled_from(["a.png", ["a.png", "b.png"]]) | anything,
        "conversations": st.lists(turns | anything, max_size=4) | anything,
    },
)


@settings(deadline=None, max_examples=150)
@given(row_like | anything)
def test_any_row_is_accepted_or_has_a_reason(row):
    try:
        parsed = parse_row(row)
    except BadRow as error:
        reason = error.reason
    else:
        reason = None
        assert [t.role for t in parsed.turns if t.role == "human"]
        assert parsed.turns[-1].role == "gpt" or parsed.turns[-2].role == "gpt"
        markers = sum(t.text.count(IMAGE_PLACEHOLDER) for t in parsed.turns if t.role == "human")
        assert not parsed.images or markers in (0, len(parsed.images))
        json.dumps([t.text for t in parsed.turns], ensure_ascii=False).encode()
    assert reason is None or reason in BAD_ROWS


def write(path, rows):
    path.write_text(json.dumps(rows))
    return str(path)


def recipe_data(tmp_path, pretrain, finetune, images=(), **more):
    folder = tmp_path / "images"
    for name in images:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"picture")
    folder.mkdir(exist_ok=True)
    return Data(
        source="llava",
        pretrain_json=write(tmp_path / "pretrain.json", pretrain),
        finetune_json=write(tmp_path / "finetune.json", finetune),
        pretrain_images=str(folder),
        finetune_images=str(folder),
        **more,
    )


def test_tables_of_a_small_set(tmp_path):
    caption = chat("<image>\nDescribe.", "A cat.", image="a.png", id="1")
    rows = [
        chat("<image>\nWhat?", "A cat.", image="a.png", id="1"),
        chat("Hello?", "Hi.", id="1"),
        chat("<image>\nWhat?", "A dog.", image="sub/b.png"),
        chat("<image>\nWhat?", "A ghost.", image="sub/gone.png", id="x"),
        chat("<image>\n<image>\nCompare.", "Both.", image=["a.png", "sub/b.png"], id="1"),
        "junk",
    ]
    bundle = build(recipe_data(tmp_path, [caption], rows, ["a.png", "sub/b.png"], test_fraction=0.0))
    images = {i.image_id: i for i in bundle.images}
    assert images.keys() == {"a.png", "sub/b.png"}
    assert all(Path(i.uri).read_bytes() == b"picture" for i in images.values())
    assert [s.sample_id for s in bundle.pretrain] == ["1"]
    finetune = list(bundle.finetune)
    assert [s.sample_id for s in finetune] == ["1", "1#2", "row-2", "1#3"]
    assert [s.image_ids for s in finetune] == [("a.png",), (), ("sub/b.png",), ("a.png", "sub/b.png")]
    assert [(r.row_id, r.reason) for r in bundle.rejected] == [
        ("x", "missing_image"),
        ("row-5", "not_an_object"),
    ]


def test_ids_that_look_like_repeats_stay_apart(tmp_path):
    rows = [chat("q", "a", id=i) for i in ("a", "a#2", "a", "a", "a#2")]
    ids = [s.sample_id for s in build(recipe_data(tmp_path, rows, rows)).finetune]
    assert len(set(ids)) == 5
    assert ids[:3] == ["a", "a#2", "a#3"]


def test_held_out_images_are_never_trained_on_in_either_stage(tmp_path):
    names = [f"{n}.png" for n in range(200)]
    pretrain = [chat("<image>", f"caption {n}", image=n) for n in names]
    finetune = [chat("What colour?\n<image>", "Blue.", image=n, id=n) for n in names]
    bundle = build(recipe_data(tmp_path, pretrain, finetune, names, test_fraction=0.25))
    test = {n for n in names if held_out(n, 0.25)}
    assert 20 < len(test) < 80
    for samples in (bundle.pretrain, bundle.finetune):
        assert {i for s in samples for i in s.image_ids} == set(names) - test
    questions = list(bundle.questions)
    assert {q.image_id for q in questions} == test
    assert questions[0].question == "What colour?"
    assert questions[0].accepted == ("Blue.",)
    assert {q.task for q in questions} == {"grounding"}
    assert Counter(i.split for i in bundle.images) == {"train": 200 - len(test), "test": len(test)}


def test_only_short_answers_about_one_image_make_questions(tmp_path):
    images = [f"{n}.png" for n in range(5)]
    rows = [
        chat("<image>\nq", "one two three four five", image=images[0], id="short"),
        chat("<image>\nq", "one two three four five six", image=images[1], id="long"),
        chat("<image>", "Yes", image=images[2], id="no question"),
        chat("<image><image>\nq", "Yes", image=images[3:5], id="two images"),
        chat("q", "Yes", id="text"),
        chat("<image>\nq", "  ", image=images[1], id="silent"),
        {**chat("<image>\nq", "No", image=images[2], id="greeted")},
    ]
    rows[-1]["conversations"].insert(0, turn("gpt", "Hello."))
    bundle = build(recipe_data(tmp_path, rows, rows, images, test_fraction=0.999999))
    assert [(q.question_id, q.question, q.accepted) for q in bundle.questions] == [
        ("short", "q", ("one two three four five",)),
        ("greeted", "q", ("No",)),
    ]
    assert [i.image_id for i in bundle.images] == [images[0], images[2]]
    assert [s.sample_id for s in bundle.finetune] == ["text"]


@pytest.mark.parametrize(("answer", "kind"), [("Yes.", "yes_no"), ("12", "number"), ("red", "other")])
def test_kinds_of_answers(answer, kind, tmp_path):
    data = recipe_data(
        tmp_path, [], [chat("<image>\nq", answer, image="a.png")], ["a.png"], test_fraction=0.999999
    )
    assert [q.kind for q in build(data).questions] == [kind]


def test_two_image_folders_may_use_the_same_names(tmp_path):
    for stage in ("one", "two"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "a.png").write_text(stage)
    rows = write(tmp_path / "rows.json", [chat("<image>\nq", "a", image="a.png")])
    data = Data(
        pretrain_json=rows,
        finetune_json=rows,
        pretrain_images=str(tmp_path / "one"),
        finetune_images=str(tmp_path / "two"),
        test_fraction=0.0,
    )
    bundle = build(data)
    images = {i.image_id: Path(i.uri).read_text() for i in bundle.images}
    assert [images[i] for s in bundle.pretrain for i in s.image_ids] == ["one"]
    assert [images[i] for s in bundle.finetune for i in s.image_ids] == ["two"]


def test_images_beside_the_file_absolute_paths_and_uris(tmp_path):
    (tmp_path / "a.png").write_bytes(b"a")
    rows = [
        chat("<image>\nq", "a", image="./a.png"),
        chat("<image>\nq", "a", image=str(tmp_path / "a.png")),
        chat("<image>\nq", "a", image="s3://bucket/a.png"),
        chat("<image>\nq", "a", image=f"file://{tmp_path}/gone.png"),
        chat("<image>\nq", "a", image="a\0.png"),
        chat("<image>\nq", "a", image="x" * 5000 + "/a.png"),
        chat("<image>\nq", "a", image="../rows.json"),
        chat("<image>\nq", "a", image="sub/../../rows.json"),
        chat("<image>\nq", "a", image="sub/../a.png"),
    ]
    path = write(tmp_path / "rows.json", rows)
    bundle = build(Data(pretrain_json=path, finetune_json=path, test_fraction=0.0))
    ids = [s.image_ids[0] for s in bundle.finetune]
    assert ids == ["a.png", str(tmp_path / "a.png"), "s3://bucket/a.png"]
    # "sub/../a.png" needs the folder "sub", which is not there.
    assert count_reasons(bundle.rejected) == {"missing_image": 3, "bad_image_field": 3}


def test_lines_that_are_not_json_are_quarantined(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "\n".join([json.dumps(chat("q", "a")), '{"conversations": [', json.dumps(chat("q", "b"))])
    )
    bundle = build(Data(pretrain_json=str(path), finetune_json=str(path)))
    assert len(list(bundle.finetune)) == 2
    assert [(r.row_id, r.reason) for r in bundle.rejected] == [("row-1", "not_json")]


def test_reading_twice_gives_the_same(tmp_path):
    rows = [chat("<image>\nq", f"answer {n}", image="a.png") for n in range(5)]
    bundle = build(recipe_data(tmp_path, rows, rows, ["a.png"], test_fraction=0.0))
    assert list(bundle.finetune) == list(bundle.finetune)
    assert list(bundle.images) == list(bundle.images)


def test_a_file_that_is_not_named_or_not_there_is_a_clear_error(tmp_path):
    with pytest.raises(RecipeError, match=r"data\.pretrain_json is not set"):
        build(Data())
    with pytest.raises(RecipeError, match=r"data\.finetune_json is not set"):
        build(Data(pretrain_json="x.json"))
    bundle = build(Data(pretrain_json=str(tmp_path / "a.json"), finetune_json=str(tmp_path / "b.json")))
    with pytest.raises(DataError, match=r"a\.json cannot be read"):
        list(bundle.pretrain)


def held_out_data(tmp_path, finetune, asked, images, **more):
    data = recipe_data(tmp_path, finetune, finetune, images, **more)
    (tmp_path / "test").mkdir(exist_ok=True)
    path = write(tmp_path / "test" / "held_out.json", asked)
    return data.model_copy(update={"held_out_json": path, "held_out_images": data.finetune_images})


def test_a_file_of_questions_takes_the_place_of_a_share_of_the_images(tmp_path):
    names = [f"{n}.png" for n in range(40)]
    rows = [chat("<image>\nWhat?", "A long answer that no rule can compare.", image=n) for n in names]
    asked = [
        chat("<image>\nWhat colour is it?", "Red.", image="3.png", id="short", kind="colour"),
        chat("<image>\nHow many are there?", "There are two of them in there.", image="./4.png", id="count"),
        chat("<image>\nWhy?", "Because of many things, as they say.", image="5.png", id="free"),
        {
            **chat("<image>\nWhere is it?", "It is in the upper left.", image="6.png", id="said"),
            "match": "text",
        },
        {**chat("<image>\nWhere is it?", "Left.", image="7.png", id="odd"), "match": "magic"},
        {**chat("<image>\nHow many?", "A few.", image="8.png", id="none"), "match": "number"},
        chat("<image>\nWhat?", "Red.", image="gone.png", id="gone"),
    ]
    bundle = build(held_out_data(tmp_path, rows, asked, names, test_fraction=0.5))
    held = {"3.png", "4.png", "5.png", "6.png"}
    for samples in (bundle.pretrain, bundle.finetune):
        assert {i for s in samples for i in s.image_ids} == set(names) - held
    assert [(q.question_id, q.match, q.kind) for q in bundle.questions] == [
        ("short", "text", "colour"),
        ("count", "number", "number"),
        ("said", "text", "other"),
    ]
    assert {i.image_id for i in bundle.images if i.split == "test"} == {"3.png", "4.png", "6.png"}
    assert [(r.row_id, r.reason) for r in bundle.rejected] == [
        ("odd", "bad_match"),
        ("none", "bad_match"),
        ("gone", "missing_image"),
    ]


def test_held_out_images_of_another_folder_keep_apart(tmp_path):
    data = recipe_data(tmp_path, [], [chat("<image>\nq", "Train.", image="a.png")], ["a.png"])
    (tmp_path / "a.png").write_bytes(b"another picture")
    path = write(tmp_path / "held_out.json", [chat("<image>\nq", "Test.", image="a.png")])
    bundle = build(data.model_copy(update={"held_out_json": path}))
    assert [s.turns[1].text for s in bundle.finetune] == ["Train."]
    (question,) = bundle.questions
    pictures = {i.image_id: (i.split, Path(i.uri).read_bytes()) for i in bundle.images}
    assert pictures["a.png"] == ("train", b"picture")
    assert pictures[question.image_id] == ("test", b"another picture")


def test_the_word_match_in_other_files_is_only_another_field(tmp_path):
    rows = [{**chat("<image>\nq", "Red.", image="a.png"), "match": "magic"}]
    bundle = build(recipe_data(tmp_path, rows, rows, ["a.png"], test_fraction=0.999999))
    assert [q.match for q in bundle.questions] == ["text"]
    assert bundle.rejected == []


def test_long_answers_make_questions_where_a_rule_finds_what_counts(tmp_path):
    rows = [
        chat("<image>\nHow many pizzas are there?", "There are three pizzas in the image.", image="0.png"),
        chat("<image>\nIs the boy wearing a helmet?", "Yes, the boy is wearing a helmet.", image="1.png"),
        chat("<image>\nWhat color is the dog?", "The dog in the image is black.", image="2.png"),
        chat("<image>\nWhat is the dog doing?", "The dog in the image is running.", image="3.png"),
    ]
    images = [f"{n}.png" for n in range(4)]
    bundle = build(recipe_data(tmp_path, rows, rows, images, test_fraction=0.999999))
    assert [(q.image_id, q.match) for q in bundle.questions] == [
        ("0.png", "number"),
        ("1.png", "yes_no"),
        ("2.png", "color"),
    ]


def test_secrets_in_a_rows_addresses_do_not_reach_the_quarantine(tmp_path):
    row = chat("<image>\nq", "a", image="file:///gone.png?token=hunter2", id="https://bob:hunter2@host/a.png")
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([row, chat("q", "a")]))
    bundle = build(Data(source="llava", pretrain_json=str(file), finetune_json=str(file)))
    assert list(bundle.pretrain)
    (bad,) = bundle.rejected
    assert (bad.row_id, bad.reason) == ("https://***@host/a.png", "missing_image")
    assert bad.detail == "there is no file file:///gone.png?token=***"


def test_rows_that_are_used_but_may_not_be_meant_so_are_counted(tmp_path):
    rows = [
        chat("<image>\nWhat?", "A cat.", image="a.png"),
        chat("<image>\nWhat?", "A cat.", picture="a.png"),
        chat("<image> <image>\nWhat?", "A cat."),
        chat("<image>\n<image>\nWhat?", "A cat.", image="a.png"),
        chat("Hello?", "Write <image>."),
        chat("<image>\nWhat?", "A cat.", image="gone.png"),
        chat("<image>", "a", images=["a.png"]),
    ]
    caption = chat("<image>\nDescribe.", "A cat.", image="a.png")
    bundle = build(recipe_data(tmp_path, [caption], rows, ["a.png"], test_fraction=0.0))
    assert len(list(bundle.pretrain)) == 1
    assert len(list(bundle.finetune)) == 6
    assert list(bundle.questions) == []
    assert len(list(bundle.images)) == 1
    assert bundle.noted == {"image_mark_without_image": 2, "image_mark_repeated": 1}

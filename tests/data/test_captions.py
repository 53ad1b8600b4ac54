"""Images with captions, in every form that people keep them in."""

import csv
import json
import zipfile
from collections import Counter
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayva.data.caption_rows import parse_row, read_rows
from rayva.data.captions import build
from rayva.data.locations import join, parent
from rayva.data.quarantine import BadRow, count_reasons
from rayva.data.schema import IMAGE_PLACEHOLDER
from rayva.errors import DataError, RecipeError
from rayva.orchestration.data import fingerprint
from rayva.recipes.schema import Data, Recipe
from rayva.vision.source import read_image_bytes

BRIEF = ("Describe it briefly.",)
DETAILED = ("Describe it fully.",)
CAPTIONS = {f"{n}.jpg": [f"Picture {n} of a cat", f"A cat, the {n}th."] for n in range(12)}


def tables_of(source, **more):
    return build(Data(source="captions", captions=str(source), **more), BRIEF, DETAILED)


def put_images(folder, names=tuple(CAPTIONS)):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(name.encode())


def as_text_files(folder):
    put_images(folder)
    for name, texts in CAPTIONS.items():
        (folder / name).with_suffix(".txt").write_text("\n".join(texts) + "\n\n")
    return folder


def as_json_lines(folder):
    put_images(folder)
    lines = [json.dumps({"file_name": n, "captions": t}) for n, t in CAPTIONS.items()]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


def as_json_file(folder):
    put_images(folder)
    rows = [{"image": n, "captions": t} for n, t in CAPTIONS.items()]
    (folder / "my.json").write_text(json.dumps(rows))
    return folder / "my.json"


def as_parquet_of_paths(folder):
    put_images(folder)
    table = pa.table({"path": list(CAPTIONS), "captions": list(CAPTIONS.values())})
    pq.write_table(table, folder / "captions.parquet")
    return folder


def as_parquet_of_bytes(folder):
    folder.mkdir()
    contents = [name.encode() for name in CAPTIONS]
    table = pa.table({"image_id": list(CAPTIONS), "image": contents, "captions": list(CAPTIONS.values())})
    pq.write_table(table, folder / "t.parquet")
    return folder / "t.parquet"


def as_folder_of_parquet_structs(folder):
    folder.mkdir()
    names = list(CAPTIONS)
    for part, some in enumerate((names[:5], names[5:])):
        structs = [{"bytes": n.encode(), "path": n} for n in some]
        table = pa.table({"id": some, "image": structs, "text": [CAPTIONS[n] for n in some], "other": some})
        pq.write_table(table, folder / f"part-{part}.parquet")
    return folder


@pytest.mark.parametrize(
    "form",
    [
        as_text_files,
        as_json_lines,
        as_json_file,
        as_parquet_of_paths,
        as_parquet_of_bytes,
        as_folder_of_parquet_structs,
    ],
)
def test_every_form_gives_the_same_tables(form, tmp_path):
    bundle = tables_of(form(tmp_path / "pictures"), test_fraction=0.3)
    images = {i.image_id: i for i in bundle.images}
    assert {name: list(i.captions) for name, i in images.items()} == CAPTIONS
    for name, image in images.items():
        content = image.content if image.content is not None else Path(image.uri).read_bytes()
        assert content == name.encode()
    train = {name for name, i in images.items() if i.split == "train"}
    assert 0 < len(train) < len(CAPTIONS)
    assert {s.image_ids[0] for s in bundle.pretrain} == train
    assert {s.image_ids[0] for s in bundle.finetune} == train
    assert {q.image_id for q in bundle.questions} == set(CAPTIONS) - train
    assert bundle.rejected == []


def test_csv_with_one_caption_a_row(tmp_path):
    put_images(tmp_path, ["a.jpg", "b.jpg"])
    with open(tmp_path / "captions.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerows([["image", "caption"], ["a.jpg", "One, two"], ["a.jpg", "Three"], ["b.jpg", ""]])
    bundle = tables_of(tmp_path, test_fraction=0.0)
    assert [(i.image_id, i.captions) for i in bundle.images] == [("a.jpg", ("One, two", "Three"))]
    assert [(r.row_id, r.reason) for r in bundle.rejected] == [("row-2", "no_caption")]


def csv_tables(folder, text):
    put_images(folder, ["a.png", "b.png", "c.png"])
    (folder / "captions.csv").write_text(text)
    bundle = tables_of(folder, test_fraction=0.0)
    captions = {image.image_id: image.captions for image in bundle.images}
    return captions, [(row.row_id, row.reason, row.detail) for row in bundle.rejected]


def test_a_csv_row_with_an_unquoted_comma_is_refused(tmp_path):
    text = 'image,caption\na.png,A dog, a cat and a bird\nb.png,A cow\nc.png, "A pig, a hen"\n'
    captions, refused = csv_tables(tmp_path, text)
    assert captions == {"b.png": ("A cow",)}
    assert [row[:2] for row in refused] == [("row-0", "too_many_fields"), ("row-2", "too_many_fields")]
    assert refused[0][2].startswith("line 2: 3 fields for 2 columns")


@pytest.mark.parametrize(
    "spoilt",
    [
        'a.png,"A dog\nb.png,A cow"\n',  # one text for Python
        'a.png,"A dog\nb.png,"A cow"\n',  # ',' expected after '"'
        'a.png,"A "big" dog"\nb.png,"A cow" \n',  # each on a line of its own
        '"a.png,A dog\nb.png,A cow"\n',
    ],
)
def test_every_csv_line_that_a_quote_spoils_is_told_and_the_next_is_read(spoilt, tmp_path):
    captions, refused = csv_tables(tmp_path, f"image,caption\n{spoilt}\nc.png,A pig\n")
    assert captions == {"c.png": ("A pig",)}
    assert [row[:2] for row in refused] == [("row-0", "not_csv"), ("row-1", "not_csv")]
    assert "quote" in refused[0][2]


def test_a_csv_text_may_hold_line_breaks_commas_and_quotes(tmp_path):
    text = 'image,caption\na.png,"A dog\non a ""beach"", in the sun.\n\nIt runs."\nb.png,A 6" rule\n'
    captions, refused = csv_tables(tmp_path, text)
    assert captions == {
        "a.png": ('A dog\non a "beach", in the sun.\n\nIt runs.',),
        "b.png": ('A 6" rule',),
    }
    assert refused == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("image;caption\na.png;a cat, asleep\n", "has semicolons between its columns"),
        ("image\tcaption\na.png\tx\n", "has tabs between its columns"),
        ("image,caption,caption\na.png,x,y\n", "several columns called caption"),
    ],
)
def test_a_csv_header_that_is_not_ours_is_told_by_name(text, told, tmp_path):
    (tmp_path / "captions.csv").write_text(text)
    with pytest.raises(DataError, match=told):
        tables_of(tmp_path)


def test_a_parquet_table_with_two_columns_of_one_name_is_refused(tmp_path):
    table = pa.table([pa.array(["a.png"]), pa.array(["x"]), pa.array(["y"])], ["image", "caption", "caption"])
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(DataError, match="several columns called caption"):
        tables_of(tmp_path / "t.parquet")


def test_blanks_in_a_csv_header_and_empty_cells_mean_nothing(tmp_path):
    text = "\n image, path ,captions,caption\na.png,,one,\n,b.png,,two\n"
    (tmp_path / "captions.csv").write_text(text)
    found = [parse_row(value) for _, value, _ in read_rows(str(tmp_path)).values]
    assert [(row.image, row.captions) for row in found] == [("a.png", ("one",)), ("b.png", ("two",))]


def test_a_csv_file_that_ends_within_quotes_is_refused(tmp_path):
    with pytest.raises(DataError, match="a quote that opens in line 3 is never closed"):
        csv_tables(tmp_path, 'image,caption\na.png,A dog\nb.png,"A cow\nc.png,A pig\n')


@pytest.mark.parametrize("inside", ["p/", ""])
@pytest.mark.parametrize("form", ["txt", "csv", "csv itself"])
def test_an_archive_is_read_through_a_chain(form, inside, tmp_path):
    archive = tmp_path / "z.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name, caption in (("a.jpg", "A dog"), ("b.jpg", "A cow")):
            file.writestr(f"{inside}{name}", name)
            if form == "txt":
                file.writestr(f"{inside}{name[0]}.txt", caption)
        if form != "txt":
            file.writestr(f"{inside}captions.csv", "image,caption\na.jpg,A dog\nb.jpg,A cow\n")
    file_in_it = "captions.csv" if form == "csv itself" else ""
    uri = f"zip://{inside}{file_in_it}::file://{archive}"
    images = list(tables_of(uri, test_fraction=0.0).images)
    assert [image.captions for image in images] == [("A dog",), ("A cow",)]
    assert [read_image_bytes(image.uri) for image in images] == [b"a.jpg", b"b.jpg"]
    assert fingerprint(Recipe(name="r", data=Data(source="captions", captions=uri)))


@pytest.mark.parametrize(
    ("folder", "name", "joined"),
    [
        ("/data", "a.png", "/data/a.png"),
        ("/", "a.png", "/a.png"),
        ("/x::y", "a.png", "/x::y/a.png"),
        ("s3://b/p/c", "a.png", "s3://b/p/c/a.png"),
        ("memory://", "a.png", "memory://a.png"),
        ("zip://p::file:///z.zip", "a.png", "zip://p/a.png::file:///z.zip"),
        ("zip://::s3://b/z.zip", "a.png", "zip://a.png::s3://b/z.zip"),
    ],
)
def test_names_are_joined_to_folders_and_parted_again(folder, name, joined):
    assert join(folder, name) == joined
    assert parent(joined) == folder


def test_why_no_row_is_usable_is_told(tmp_path):
    (tmp_path / "captions.csv").write_text("image,caption\na.png,A dog, a cat\ngone.png,A cow\nb.png,A, b\n")
    told = r"\(quarantined: 2 too_many_fields, 1 missing_image; the first, row-0: line 2: 3 fields"
    with pytest.raises(DataError, match=told):
        tables_of(tmp_path)
    (tmp_path / "captions.csv").write_text("image,caption\n")
    with pytest.raises(DataError, match="holds no image with a caption\n"):
        tables_of(tmp_path)


def one_caption_a_row(folder, form):
    """A row for each caption, with an id of its own, the second captions of all pictures after the first."""
    names = [name for _ in range(2) for name in CAPTIONS]
    texts = [CAPTIONS[name][turn] for turn in range(2) for name in CAPTIONS]
    folder.mkdir()
    images = {
        "name": names,
        "./name": [f"{'./' * (row // len(CAPTIONS))}{name}" for row, name in enumerate(names)],
        "path": [
            name if row < len(CAPTIONS) else f"file://{folder / name}" for row, name in enumerate(names)
        ],
        "bytes": [name.encode() for name in names],
    }[form]
    if form != "bytes":
        put_images(folder)
    table = pa.table({"id": list(range(len(names))), "image": images, "caption": texts})
    pq.write_table(table, folder / "captions.parquet")
    return folder / "captions.parquet"


@pytest.mark.parametrize("form", ["name", "./name", "path", "bytes"])
def test_rows_of_one_picture_are_one_image_on_one_side(form, tmp_path):
    bundle = tables_of(one_caption_a_row(tmp_path / "p", form), test_fraction=0.4, samples_per_image=8)
    images = list(bundle.images)
    assert [i.image_id for i in images] == [str(n) for n in range(len(CAPTIONS))]
    assert [list(i.captions) for i in images] == list(CAPTIONS.values())
    own = {i.image_id: [c.rstrip(".") for c in i.captions] for i in images}
    train = {i.image_id for i in images if i.split == "train"}
    assert 0 < len(train) < len(images)
    pretrain, finetune, questions = list(bundle.pretrain), list(bundle.finetune), list(bundle.questions)
    assert {s.image_ids[0] for s in (*pretrain, *finetune)} == train
    assert {q.image_id for q in questions} == own.keys() - train
    assert sorted(s.turns[1].text for s in pretrain) == sorted(
        caption for i in images if i.split == "train" for caption in i.captions
    )
    asked = [(q.image_id, q.question, q.accepted[0]) for q in questions]
    for sample in finetune:
        texts = [turn.text for turn in sample.turns]
        pairs = zip(texts[::2], texts[1::2], strict=True)
        asked += [(sample.image_ids[0], q, a.lower()) for q, a in pairs if a in ("Yes", "No")]
    assert {answer for _, _, answer in asked} == {"yes", "no"}
    for image_id, question, answer in asked:
        assert any(f"picture: {caption}." in question for caption in own[image_id]) == (answer == "yes")


def test_a_picture_is_on_the_same_side_whatever_its_rows_are_called(tmp_path):
    def split_of(folder, ids):
        table = {"image": list(CAPTIONS), "caption": [texts[0] for texts in CAPTIONS.values()]}
        pq.write_table(pa.table({**table, **ids}), folder / "captions.parquet")
        return [i.split for i in tables_of(folder, test_fraction=0.4).images]

    put_images(tmp_path)
    splits = split_of(tmp_path, {})
    assert set(splits) == {"train", "test"}
    for first in (0, 100):
        assert split_of(tmp_path, {"id": [first + row for row in range(len(CAPTIONS))]}) == splits


def test_two_pictures_of_one_id_stay_two(tmp_path):
    table = pa.table({"id": ["x", "x"], "image": [b"1", b"2"], "caption": ["A cat.", "A dog."]})
    pq.write_table(table, tmp_path / "t.parquet")
    images = tables_of(tmp_path / "t.parquet", test_fraction=0.0).images
    assert [(i.image_id, i.content) for i in images] == [("x", b"1"), ("x#2", b"2")]


def test_other_file_systems():
    fs = fsspec.filesystem("memory")
    fs.pipe("/captions-test/a.jpg", b"a")
    fs.pipe("/captions-test/a.txt", b"A cat.")
    bundle = tables_of("memory://captions-test", test_fraction=0.0)
    (image,) = bundle.images
    assert image.captions == ("A cat.",)
    assert fsspec.open(image.uri).open().read() == b"a"


def test_stage_1_pairs_every_caption_with_a_request(tmp_path):
    samples = list(tables_of(as_text_files(tmp_path / "p"), test_fraction=0.0).pretrain)
    assert len(samples) == 2 * len(CAPTIONS)
    assert {s.turns[0].text for s in samples} == {f"{IMAGE_PLACEHOLDER}\n{BRIEF[0]}"}
    assert {s.turns[1].text for s in samples} == {t for texts in CAPTIONS.values() for t in texts}
    assert len({s.sample_id for s in samples}) == len(samples)


def test_stage_2_shows_each_image_once_and_answers_truly(tmp_path):
    bundle = tables_of(as_text_files(tmp_path / "p"), test_fraction=0.0, samples_per_image=3)
    samples = list(bundle.finetune)
    assert len(samples) == 3 * len(CAPTIONS)
    for sample in samples:
        questions = [t.text for t in sample.turns[::2]]
        answers = [t.text for t in sample.turns[1::2]]
        assert questions[0].startswith(f"{IMAGE_PLACEHOLDER}\n")
        assert sum(q.count(IMAGE_PLACEHOLDER) for q in questions) == 1
        own = [caption.rstrip(".") for caption in CAPTIONS[sample.image_ids[0]]]
        for question, answer in zip(questions, answers, strict=True):
            if answer in ("Yes", "No"):
                assert any(f"picture: {caption}." in question for caption in own) == (answer == "Yes")
            else:
                assert all(caption in answer for caption in own) or answer in CAPTIONS[sample.image_ids[0]]
    answers = Counter(t.text for s in samples for t in s.turns if t.text in ("Yes", "No"))
    assert answers["Yes"] == answers["No"]


def test_questions_are_balanced_and_true(tmp_path):
    questions = list(tables_of(as_text_files(tmp_path / "p"), test_fraction=0.5).questions)
    assert Counter(q.accepted for q in questions)[("yes",)] * 2 == len(questions) > 0
    for question in questions:
        own = any(caption.rstrip(".") in question.question for caption in CAPTIONS[question.image_id])
        assert own == (question.accepted == ("yes",))


def test_equal_captions_make_no_question_with_a_wrong_answer(tmp_path):
    put_images(tmp_path)
    for name in CAPTIONS:
        (tmp_path / name).with_suffix(".txt").write_text("The same cat.")
    bundle = tables_of(tmp_path, test_fraction=0.5)
    assert list(bundle.questions) == []
    assert all(t.text != "No" for s in bundle.finetune for t in s.turns)


def test_bad_rows_are_quarantined(tmp_path):
    put_images(tmp_path, ["a.jpg"])
    lines = [
        json.dumps({"image": "a.jpg", "caption": "A cat."}),
        json.dumps({"image": "gone.jpg", "caption": "A ghost."}),
        json.dumps({"caption": "A cat."}),
        json.dumps({"image": "a.jpg"}),
        json.dumps({"image": "a.jpg", "captions": [None, " "]}),
        json.dumps({"image": 7, "caption": "A cat."}),
        json.dumps({"image": "a.jpg", "caption": "\ud800"}),
        json.dumps(["a.jpg", "A cat."]),
        "{",
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    bundle = tables_of(tmp_path, test_fraction=0.0)
    assert len(list(bundle.images)) == 1
    assert count_reasons(bundle.rejected) == {
        "no_caption": 2,
        "missing_image": 1,
        "no_image": 1,
        "bad_image_field": 1,
        "invalid_text": 1,
        "not_an_object": 1,
        "not_json": 1,
    }


def test_a_parquet_row_that_is_no_text_is_quarantined(tmp_path):
    put_images(tmp_path, ["a.jpg", "b.jpg"])
    broken = pa.array([b"A cat.", b"\xff\xfe", b"A dog."]).cast(pa.binary()).view(pa.string())
    pq.write_table(
        pa.table({"image": ["a.jpg", "a.jpg", "b.jpg"], "caption": broken}), tmp_path / "t.parquet"
    )
    bundle = tables_of(tmp_path / "t.parquet", test_fraction=0.0)
    assert [i.image_id for i in bundle.images] == ["a.jpg", "b.jpg"]
    assert [(r.row_id, r.reason) for r in bundle.rejected] == [("row-1", "invalid_text")]


def test_images_without_text_and_text_that_is_no_text(tmp_path):
    put_images(tmp_path, ["a.jpg", "b.jpg", "c.jpg"])
    (tmp_path / "a.txt").write_text("A cat.")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xff")
    bundle = tables_of(tmp_path, test_fraction=0.0)
    assert [i.image_id for i in bundle.images] == ["a.jpg"]
    assert {(r.row_id, r.reason) for r in bundle.rejected} == {
        ("row-1", "invalid_text"),
        ("row-2", "no_caption"),
    }


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=5,
)
columns = ["image", "file_name", "path", "caption", "captions", "text", "id", "image_id"]


@settings(deadline=None, max_examples=80)
@given(st.dictionaries(st.sampled_from(columns), anything) | anything)
def test_any_row_is_accepted_or_has_a_reason(value):
    try:
        row = parse_row(value)
    except BadRow as error:
        reason = error.reason
    else:
        reason = None
        assert (row.image is None) != (row.content is None)
        assert row.captions
        assert all(text.strip() and text.encode() for text in row.captions)
    assert reason in {None, "not_an_object", "no_image", "bad_image_field", "no_caption", "invalid_text"}


def test_what_cannot_be_read_is_a_clear_error(tmp_path):
    with pytest.raises(RecipeError, match="captions is not set"):
        build(Data(source="captions"), BRIEF, DETAILED)
    with pytest.raises(DataError, match="neither an existing folder nor"):
        tables_of(tmp_path / "gone")
    with pytest.raises(DataError, match="does not exist"):
        tables_of(tmp_path / "gone.parquet")
    with pytest.raises(DataError, match="neither images nor"):
        tables_of(tmp_path)
    (tmp_path / "t.parquet").write_bytes(b"junk")
    with pytest.raises(DataError, match="not a readable Parquet table"):
        tables_of(tmp_path / "t.parquet")
    pq.write_table(pa.table({"image": ["a.jpg"], "label": ["cat"]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"no caption column \(it has: image, label\)"):
        tables_of(tmp_path / "t.parquet")
    put_images(tmp_path, ["a.jpg"])
    with pytest.raises(DataError, match="no image with a caption"):
        tables_of(tmp_path)

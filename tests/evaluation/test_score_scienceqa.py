"""ScienceQA from files of predictions: the published figures, every form of file, ensembles, bad files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from rayva.commands import score
from rayva.errors import DataError, RecipeError
from rayva.evaluation.predictions import Predictions, read_predictions
from rayva.evaluation.tasks.registry import make_tasks
from rayva.evaluation.tasks.scienceqa import (
    Problem,
    parse_choice,
    question_text,
    read_problems,
    score_predictions,
)
from rayva.evaluation.tasks.scienceqa_ensemble import answer_of, complement, judge_prompt, judged
from tests.evaluation.released import figures, rayva
from tests.reference import SCIENCEQA, needs

CHOICES = ["red", "green", "blue"]


def problem(key: str, answer: int, **fields: Any) -> Problem:
    given = {"hint": "", "image": None, "subject": None, "grade": None, **fields}
    return Problem(key, f"Question {key}?", tuple(CHOICES), answer, **given)


def write(path: Path, value: object) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    """Four problems with all fields, in files."""
    rows = {
        "1": ("natural science", "grade2", "A hint.", None, 0),
        "2": ("social science", "grade7", "", "image.png", 1),
        "3": ("language science", "grade12", "A hint.", "image.png", 2),
        "4": ("natural science", "grade6", "", None, 0),
    }
    problems = {
        key: {
            "question": f"Question {key}?", "choices": CHOICES, "answer": answer, "hint": hint,
            "image": image, "subject": subject, "grade": grade, "split": "test",
        }
        for key, (subject, grade, hint, image, answer) in rows.items()
    }  # fmt: skip
    problems["9"] = {**problems["1"], "split": "train"}
    return {
        "problems": write(tmp_path / "problems.json", problems),
        "splits": write(tmp_path / "pid_splits.json", {"test": list(rows), "train": ["9"]}),
        "folder": tmp_path,
    }


@needs(SCIENCEQA)
def test_the_published_predictions_of_llava_13b() -> None:
    found = figures(
        "score", "scienceqa", "--problems", SCIENCEQA / "problems_test_partial.json",
        "--splits", SCIENCEQA / "pid_splits.json",
        "--predictions", SCIENCEQA / "llava_13b_v0_predictions.json",
    )  # fmt: skip
    parsed, stored = found["from_outputs"], found["from_indices"]
    assert (parsed["correct"], parsed["count"], parsed["unparsable"]) == (3855, 4241, 1)
    assert round(parsed["accuracy"], 2) == 90.90
    assert stored["correct"] == 3856
    assert round(stored["accuracy"], 2) == 90.92
    cells = {name: round(cell["accuracy"], 2) for name, cell in stored["by_context"].items()}
    assert cells == {"TXT": 89.49, "IMG": 88.00, "NO": 90.66}
    assert [row["question_id"] for row in found["differ"]] == ["3247"]
    assert set(found["not_available"]) == {"by_subject", "by_grade"}


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("The answer is B.", 1),
        ("LECTURE: ...\nThe answer is C. BECAUSE: it is.", 2),
        ("A", 0),
        (" B\n", 1),
        ("C. blue", 2),
        ("SOLUTION: ...\n###\nANSWER: B.", 1),
        ("The answer is A. No: The answer is B.", None),
        ("The answer is D.", None),  # there are three choices
        ("The answer is b.", None),
        ("3. The answer is B.", 1),
        ("3", None),
        ("blue", None),
        ("", None),
    ],
)
def test_answers_are_read_by_rule(text: str, index: int | None) -> None:
    assert parse_choice(text, len(CHOICES)) == index


def test_questions_are_written_as_the_conversion_does() -> None:
    plain = problem("1", 0)
    assert question_text(plain, "QCM-LEA") == "Question 1?\nContext: N/A\nOptions: (A) red (B) green (C) blue"
    hinted = problem("2", 0, hint="Look.")
    assert question_text(hinted, "CQM-A").startswith("Context: Look.\nQuestion: Question 2?\nOptions:")
    assert question_text(hinted, "QCM-A").endswith(
        "Answer with the option's letter from the given choices directly."
    )


def test_breakdowns_and_counts(data: dict[str, Path]) -> None:
    outputs = {"1": "The answer is A.", "2": "The answer is A.", "3": "no idea"}
    results = {"1": 0, "2": 1, "3": -1}
    file = write(data["folder"] / "p.json", {"acc": 50.0, "results": results, "outputs": outputs})
    problems = read_problems(str(data["problems"]), str(data["splits"]), "test")
    found = score_predictions(problems, read_predictions(str(file)), "test").figures
    parsed = found["from_outputs"]
    assert found["missing"] == 1
    assert (parsed["correct"], parsed["count"], parsed["unparsable"]) == (1, 4, 2)
    assert parsed["accuracy"] == 25.0
    assert {name: (cell["correct"], cell["count"]) for name, cell in parsed["by_subject"].items()} == {
        "NAT": (1, 2), "SOC": (0, 1), "LAN": (0, 1)
    }  # fmt: skip
    assert {n: (c["correct"], c["count"]) for n, c in parsed["by_grade"].items()} == {
        "G1-6": (1, 2), "G7-12": (0, 2)
    }  # fmt: skip
    assert {n: c["count"] for n, c in parsed["by_context"].items()} == {"TXT": 2, "IMG": 2, "NO": 1}
    assert found["from_indices"]["correct"] == 2
    assert found["differ"] == [{"question_id": "2", "from_outputs": "A", "from_indices": "B", "answer": "B"}]
    assert found["not_available"] == {}
    assert found["reported_by_file"] == {"acc": 50.0}


def test_nulls_gaps_and_indices_as_text_are_read_and_counted(data: dict[str, Path]) -> None:
    outputs = {"1": "The answer is A.", "2": None, "4": "A"}
    results = {"1": "0", "2": "1", "3": 2.0, "4": None}
    file = write(data["folder"] / "p.json", {"results": results, "outputs": outputs})
    given = read_predictions(str(file))
    assert given.indices == {"1": 0, "2": 1, "3": 2, "4": -1}
    problems = read_problems(str(data["problems"]), str(data["splits"]), "test")
    found = score_predictions(problems, given, "test").figures
    assert (found["missing"], found["without_output"], found["without_index"]) == (0, 2, 0)
    assert (found["from_outputs"]["correct"], found["from_outputs"]["unparsable"]) == (2, 2)
    assert (found["from_indices"]["correct"], found["from_indices"]["unparsable"]) == (3, 1)
    write(file, {"results": {"1": 0}, "outputs": outputs})
    found = score_predictions(problems, read_predictions(str(file)), "test").figures
    assert (found["missing"], found["without_index"], found["from_indices"]["unparsable"]) == (1, 2, 3)
    write(file, {"results": {"1": 0, "2": 1}, "outputs": None})
    assert read_predictions(str(file)).outputs == {}


@pytest.mark.parametrize("index", ["B", "", "2.5", 2.5, True, [2]])
def test_an_index_that_may_mean_anything_is_named(data: dict[str, Path], index: object) -> None:
    file = write(data["folder"] / "p.json", {"results": {"1": 0, "7": index}})
    with pytest.raises(DataError, match=r"results\['7'\]: expected a whole number"):
        read_predictions(str(file))


def test_without_a_file_of_splits_the_problems_say_it_themselves(data: dict[str, Path]) -> None:
    """All splits are in the official file of problems; a figure over all of them would be wrong."""
    path = str(data["problems"])
    assert [p.problem_id for p in read_problems(path, None, "test")] == ["1", "2", "3", "4"]
    assert [p.problem_id for p in read_problems(path, None, "train")] == ["9"]
    with pytest.raises(DataError, match="'val' is empty"):
        read_problems(path, None, "val")
    whole = json.loads(data["problems"].read_text())
    del whole["2"]["split"]
    data["problems"].write_text(json.dumps(whole))
    assert len(read_problems(path, None, "test")) == 5


def test_an_evaluation_needs_no_file_of_splits_and_names_its_own_settings(data: dict[str, Path]) -> None:
    def ids(*settings: str) -> list[str]:
        (task,) = make_tasks(["scienceqa"], [f"scienceqa.folder={data['folder']}", *settings])
        return [item.item_id for item in task.read()]

    assert ids() == ["1", "2", "3", "4"]
    write(data["splits"], {"test": ["3"], "train": []})
    assert ids() == ["3"]  # the file counts where there is one
    with pytest.raises(DataError, match=r"it has test, train\n.*as scienceqa\.split"):
        ids("scienceqa.split=val")
    data["splits"].unlink()
    assert ids() == ["1", "2", "3", "4"]
    assert ids("scienceqa.split=train") == ["9"]
    with pytest.raises(DataError, match=r"scienceqa\.splits = .*nowhere"):
        ids("scienceqa.splits=nowhere.json")
    data["problems"].unlink()
    with pytest.raises(DataError, match=r"scienceqa\.problems = "):
        ids()


def test_images_lie_in_a_folder_of_their_split_or_not(data: dict[str, Path]) -> None:
    (task,) = make_tasks(["scienceqa"], [f"scienceqa.folder={data['folder']}"])
    assert task.read()[1].pictures[0].uri == str(data["folder"] / "images" / "2" / "image.png")
    (data["folder"] / "images" / "test").mkdir(parents=True)
    assert task.read()[1].pictures[0].uri == str(data["folder"] / "images" / "test" / "2" / "image.png")


def test_another_file_in_place_of_the_splits_is_named_in_a_line(data: dict[str, Path]) -> None:
    with pytest.raises(DataError, match=r"has no split 'test'; it has none\n.*pid_splits"):
        read_problems(str(data["problems"]), str(data["problems"]), "test")
    with pytest.raises(DataError, match=r"has no split 'val'; it has test, train\n"):
        read_problems(str(data["problems"]), str(data["splits"]), "val")


TEXTS = {"1": "The answer is A.", "2": "B", "3": "C. blue", "4": "The answer is B."}


@pytest.mark.parametrize(
    "written",
    [
        {"results": {"1": 0, "2": 1, "3": 2, "4": 1}},
        {"acc": 75, "correct": 3, "count": 4, "shot_qids": ["9"], "args": {}, "outputs": TEXTS,
         "results": {"1": 0, "2": 1, "3": 2, "4": 1}},
        TEXTS,
        {key: {"text": text} for key, text in TEXTS.items()},
        [{"question_id": key, "prompt": "?", "text": text, "answer_id": "x", "model_id": "m", "metadata": {}}
         for key, text in TEXTS.items()],
        "\n".join(json.dumps({"question_id": int(key), "text": text}) for key, text in TEXTS.items()),
        json.dumps({"correct": [{"question_id": k, "pred": t} for k, t in TEXTS.items() if k != "4"],
                    "incorrect": [{"question_id": "4", "pred": TEXTS["4"]}]}, indent=2),
    ],
    ids=["indices", "gpt3", "plain", "records", "array", "lines", "analysed"],
)  # fmt: skip
def test_every_form_of_file_gives_the_same_figure(data: dict[str, Path], written: object) -> None:
    file = write(data["folder"] / "predictions.json", written)
    problems = read_problems(str(data["problems"]), str(data["splits"]), "test")
    found = score_predictions(problems, read_predictions(str(file)), "test").figures
    figure = found["from_outputs"] or found["from_indices"]
    assert (figure["correct"], figure["count"]) == (3, 4)


def test_ensembles() -> None:
    problems = [problem(str(n), 0) for n in range(5)]
    right, wrong, none = "The answer is A.", "The answer is B.", "I cannot tell."
    first = Predictions("first", dict(zip("01234", [right, wrong, right, wrong, wrong], strict=True)))
    second = Predictions("second", dict(zip("01234", [wrong, right, none, none, right], strict=True)))
    both = complement(problems, first, second)
    assert (both["correct"], both["differ"], both["either_right"]) == (3, 5, 4)
    assert both["second"]["unparsable"] == 2
    waiting = judged(problems, first, second, None)
    assert waiting["accuracy"] is None
    assert waiting["lowest_accuracy"] == 0.0
    assert waiting["highest_accuracy"] == 80.0
    verdicts = Predictions("judge", {"0": right, "1": none, "2": wrong, "4": right})
    decided = judged(problems, first, second, verdicts)
    assert decided["correct"] == 2  # 0 and 4; 1 falls back to the first's wrong answer, 3 was never asked
    assert (decided["judge_unanswered"], decided["judge_unparsable"]) == (1, 1)
    prompt = judge_prompt(problems[0], right, wrong)
    assert prompt.index("Question 0?") < prompt.index(right) < prompt.index(wrong)


def test_the_command_with_a_second_model(data: dict[str, Path], tmp_path: Path) -> None:
    first = write(tmp_path / "f.json", TEXTS)
    second = write(tmp_path / "g.json", {"results": {"1": 0, "2": -1, "3": 2, "4": 0}})
    places = ["--problems", data["problems"], "--splits", data["splits"], "--predictions", first]
    found = figures("score", "scienceqa", *places, "--second", second, "--ensemble", "complement")
    assert found["ensemble"]["correct"] == 4
    waiting = figures("score", "scienceqa", *places, "--second", second, "--ensemble", "judge")["ensemble"]
    assert waiting["accuracy"] is None
    assert "wait for a judge: give --judged FILE or --judge-url" in waiting["note"]
    refused = rayva("score", "scienceqa", *places, "--second", second)
    assert refused.returncode == 2
    assert "--ensemble" in refused.stderr


def test_what_the_second_model_lacks_is_counted(data: dict[str, Path], tmp_path: Path) -> None:
    first = write(tmp_path / "f.json", TEXTS)
    second = write(tmp_path / "g.json", {"1": "The answer is A.", "9": "B"})  # 9 is of another split
    places = ["--problems", data["problems"], "--splits", data["splits"], "--predictions", first]
    done = rayva("score", "scienceqa", *places, "--second", second, "--ensemble", "complement")
    found = json.loads(done.stdout)["ensemble"]
    assert (found["first_missing"], found["second_missing"], found["second_not_in_split"]) == (0, 3, 1)
    assert "3 of 4 questions have no answer in the file of --second" in done.stderr
    write(second, {"9": "B"})
    refused = rayva("score", "scienceqa", *places, "--second", second, "--ensemble", "complement")
    assert refused.returncode == 2
    assert "g.json answers no problem of the split" in refused.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--ensemble judge", "--second FILE and --ensemble"),
        ("--second g --ensemble judge --judge-model m", "give --judge-url"),
        ("--second g --ensemble judge --judge-url http://h", "needs --judge-model and --judge-out"),
        ("--second g --ensemble judge --judge-url http://h --judge-out o", "needs --judge-model"),
        ("--second g --ensemble judge --judged j --judge-url http://h", "leave one of them out"),
        ("--second g --ensemble complement --judged j", "--judged is for a judge"),
        ("--second g --ensemble complement --judge-url http://h", "--judge-url is for a judge"),
        ("--judge-model m", "--judge-model is for a judge\n  -> give --second FILE --ensemble judge"),
        ("--judge-temperature 0", "--judge-temperature is for a judge"),
    ],
)
def test_options_of_an_ensemble_that_lack_one_another_are_refused(given: str, message: str) -> None:
    """Before any file is read: there are none."""
    parser = argparse.ArgumentParser()
    score.add_arguments(parser)
    options = parser.parse_args(["scienceqa", "--problems", "p", "--predictions", "f", *given.split()])
    with pytest.raises(RecipeError) as caught:
        score.run(options)
    assert message in str(caught.value)


def test_a_judge_reads_what_files_of_indices_say() -> None:
    second = Predictions("second", {}, {"1": 2, "2": -1})
    assert [answer_of(problem(key, 0), second) for key in ("1", "2", "3")] == ["The answer is C.", "", ""]
    assert answer_of(problem("1", 0), Predictions("first", {"1": "It is B."}, {"1": 0})) == "It is B."


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("", "is empty"),
        ('{"outputs": {"1": "The ans', "not whole JSON"),
        ('{"question_id": 1, "text": "A"}\n{"question_id": 2, "te', "line 2"),
        ('{"question_id": 1, "text": "A"}\n{"question_id": 1, "text": "B"}', "more than once"),
        ('{"question_id": 1, "text": "A"}\n{"review": 1}', "no question_id"),
        ({"outputs": {"1": "A"}, "results": {"2": 0}}, "different questions"),
        ({"outputs": {"77": "A"}}, "does not have"),
        ({"outputs": {"9": "A"}}, "answers no problem"),
        ({"outputs": {}, "results": {}}, "empty"),
        ({"outputs": {"1": 3}}, "expected text"),
        ({"results": {"1": "B"}}, "whole number"),
        ({"results": {"1": float("nan")}}, "NaN"),
        ([], "no rows"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_files_that_cannot_be_scored_are_refused(
    data: dict[str, Path], written: object, message: str
) -> None:
    file = write(data["folder"] / "bad.json", written)
    parser = argparse.ArgumentParser()
    score.add_arguments(parser)
    options = parser.parse_args(
        ["scienceqa", "--problems", str(data["problems"]), "--splits", str(data["splits"]),
         "--predictions", str(file)]
    )  # fmt: skip
    with pytest.raises(DataError, match=message):
        score.run(options)

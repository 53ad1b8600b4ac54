"""The pages that people open, in a real browser: whole, quiet, and safe with what teachers and models say."""

import io
from pathlib import Path

import pytest
from PIL import Image

from rayva.evaluation.comparison import compare
from rayva.evaluation.comparison_report import load_pictures, render
from rayva.evaluation.records import EVALUATION, read_run, write_result
from rayva.evaluation.tasks.base import Result, Scored
from rayva.orchestration.generate_report import GenerationReport, render_report
from rayva.storage import Storage
from tests.browser import Seen, look, needs_browser

pytestmark = [needs_browser, pytest.mark.slow]

EVIL = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>\"><svg onload=hacked=3> "
    "</style></title><iframe srcdoc='<script>parent.hacked = 4</script>'></iframe> a' onmouseover='hacked=5"
)
_HACKED = "String(window.hacked)"
_FOREIGN = (
    "document.querySelectorAll('script, iframe, link, base, form, [onerror], [onload], [onmouseover]').length"
)
_PICTURES = "[...document.images].map(image => image.complete && image.naturalWidth > 0)"
_TOO_WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
_TEXT = "document.body.innerText"


def open_page(page: str, folder: Path, **how: object) -> tuple[Seen, list[bool], str]:
    """Opens it, and checks what every page must keep; returns also what pictures loaded, and the text."""
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    seen = look(path, _HACKED, _FOREIGN, _TOO_WIDE, _PICTURES, _TEXT, **how)  # type: ignore[arg-type]
    hacked, foreign, too_wide, pictures, text = seen.values
    assert seen.messages == []
    assert (hacked, foreign) == ("undefined", 0)
    assert too_wide <= 0, "the page scrolls sideways"
    assert Image.open(io.BytesIO(seen.screenshot)).width > 300
    return seen, pictures, text


def png(colour: str, size: tuple[int, int] = (64, 48)) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", size, colour).save(sink, "PNG")
    return sink.getvalue()


def generation_page() -> str:
    images = {"red.png": png("red"), EVIL: png("blue"), "long.png": png("green", (300, 20))}
    accepted = [
        {
            "id": f"{n}-{EVIL if n == 1 else 'sample'}",
            "image": list(images)[n % 3],
            "kind": ("conversation", "detail", "reasoning", EVIL)[n % 4],
            "conversations": [
                {"from": "human", "value": f"<image>\n{EVIL if n == 1 else 'What is seen here?'}"},
                {"from": "gpt", "value": f"{EVIL if n == 1 else 'A lake in the hills. '}" * (1 + n)},
            ],
        }
        for n in range(9)
    ]
    rejected = [
        {"id": EVIL, "image": "red.png", "kind": "detail", "reason": reason, "detail": EVIL, "text": EVIL * 3}
        for reason in ("refuses", "mentions_caption", EVIL)
    ]
    summary = {
        "tasks": 12, "samples": 9, "by_kind": {"conversation": 3, "detail": 2, "reasoning": 2, EVIL: 2},
        "rejected_answers": 3, "reasons": {"refuses": 1, "mentions_caption": 1, EVIL: 1},
        "errors": {EVIL: 2}, "bad_contexts": {EVIL: 1}, "prompt_tokens": 1, "completion_tokens": 2,
        "cost": 0.5, "unfinished": 2,
    }  # fmt: skip
    contexts = {name: [EVIL, "A caption."] for name in images}
    return render_report(GenerationReport(EVIL, summary, accepted, rejected, 9.0, images.get, contexts))


def evaluation(folder: Path, right: int) -> Path:
    storage = Storage(str(folder))
    storage.write_bytes("vqa/pictures/p", png("red"))
    rows = [
        Scored(f"q{n} {EVIL if n == 0 else ''}", f"{n}: {EVIL}", f"{folder.name} {EVIL}", EVIL,
               {"accuracy": [(float(n < right), 1.0)]}, group=("a", EVIL)[n % 2], picture=EVIL)
        for n in range(8)
    ]  # fmt: skip
    figures = {"task": "vqa", "missing": 3, "note": EVIL, "why": EVIL, "left_out": {EVIL: 1}}
    write_result(storage, "vqa", Result(figures, rows), {EVIL: "vqa/pictures/p"})
    storage.write_json(EVALUATION, {"model": EVIL, "tasks": {"vqa": {}}})
    return folder


@pytest.mark.parametrize("how", [{}, {"dark": True, "size": (420, 900)}], ids=["wide", "narrow, dark"])
def test_the_report_of_a_generation(tmp_path: Path, how: dict[str, object]) -> None:
    _, pictures, text = open_page(generation_page(), tmp_path, **how)
    assert pictures == [True] * 9
    for shown in ("refuses", "A lake in the hills.", "window.hacked = 1", "9 of 12 samples", "Unfinished"):
        assert shown in text


@pytest.mark.parametrize("how", [{}, {"dark": True, "size": (420, 900)}], ids=["wide", "narrow, dark"])
def test_the_comparison_of_runs(tmp_path: Path, how: dict[str, object]) -> None:
    runs = [read_run(str(evaluation(tmp_path / name, right))) for name, right in (("a", 6), ("b", 2))]
    found = compare(runs, resamples=50)
    _, pictures, text = open_page(render(found, load_pictures(found)), tmp_path, **how)
    assert len(pictures) > 2
    assert all(pictures)
    for shown in ("Where the runs differ", "Short answers (VQA)", "window.hacked = 1", "75.0"):
        assert shown in text

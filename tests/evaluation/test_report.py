from __future__ import annotations

import io
import re
from html.parser import HTMLParser

from PIL import Image

from rayva.data.schema import Question
from rayva.evaluation.curves import curve, png, svg
from rayva.evaluation.gallery import card, choose, data_uri, thumbnail
from rayva.evaluation.gate import Decision
from rayva.evaluation.grounding import Ask, plan_asks
from rayva.evaluation.metrics import Answer
from rayva.evaluation.report import Page, render

NASTY = '<script>alert("x")</script> & "quoted"'
VOID = {"meta", "img"}


class Tags(HTMLParser):
    """Checks that tags are closed in order, and keeps all attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [value or "" for name, value in attrs if name in {"src", "href", "srcset", "data"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)  # <line/> in SVG

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def answers(count: int = 12, wrong: int = 3) -> list[Answer]:
    questions = [
        Question(
            f"q{n}", f"i{n % 5}", "grounding", f"kind{n % 3}", NASTY if n == 0 else f"What? {n}", ("red",)
        )
        for n in range(count)
    ]
    text = Question("t", "", "text", "capital", "Capital of France?", ("Paris",))
    asks = plan_asks([*questions, text], {f"i{n}": f"k{n}" for n in range(5)}, None, 0).asks
    return [Answer(ask, _say(ask, wrong)) for ask in asks]


def _say(ask: Ask, wrong: int) -> str:
    """The first `wrong` questions are answered wrongly, the others rightly with the right image."""
    if ask.condition == "right_image" and int(ask.question.question_id[1:]) >= wrong:
        return "red"
    return NASTY


def page(given: list[Answer]) -> str:
    rows = [
        {"step": float(s), "loss": 3 / s, "tokens_per_second": 1000.0, "padding_share": 0.1}
        for s in range(1, 40)
    ]
    picture = data_uri(thumbnail(Image.new("RGB", (20, 10), "red")))
    return render(
        Page(
            recipe=NASTY,
            commit="tree:0123456789abcdef0123456789",
            decision=Decision(True, "It looks."),
            answers=given,
            stages={"pretrain": rows, "finetune": []},
            exhibits=choose(given, 4),
            pictures={f"i{n}": picture for n in range(4)},
            steps=[("data", 65.0, "/runs/data")],
            counts={"images": 12345},
            reasons=[("data", NASTY, 7)],
            commands=[("Chat:", "rayva chat 'x y'")],
        )
    )


def test_the_page_is_well_formed_self_contained_and_escaped() -> None:
    text = page(answers())
    tags = Tags()
    tags.feed(text)
    tags.close()
    assert tags.open == []
    assert "script" not in tags.seen
    assert tags.links
    assert all(link.startswith("data:image/") for link in tags.links)
    assert not re.search(r"url\(|@import|https?://", text)


def test_the_page_tells_the_figures() -> None:
    text = page(answers())
    assert "Promoted" in text
    assert "75.0%" in text  # 9 of 12 with the right image
    assert "12,345" in text
    assert "1 min 05 s" in text
    assert "1,000 tokens a second" in text
    assert "10.0% padding" in text
    assert "<polyline" in text
    assert "capital" not in text  # kinds are shown for the gate's task only
    assert text.count("<article") == 4


def test_a_run_without_questions_or_curves_has_a_page_too() -> None:
    empty = render(Page("r", "c", Decision(False, "Nothing was asked."), []))
    assert "Nothing was asked." in empty
    assert "<svg" not in empty


def test_the_gallery_does_not_depend_on_the_answers_and_spreads_over_images_and_kinds() -> None:
    good, bad = choose(answers(wrong=0), 5), choose(answers(wrong=12), 5)
    assert [e.question.question_id for e in good] == [e.question.question_id for e in bad]
    assert len({e.question.image_id for e in good}) == 5
    assert {e.question.kind for e in good} == {"kind0", "kind1", "kind2"}
    assert len(choose(answers(), 100)) == 12
    assert all(list(e.answers) == ["right_image", "shuffled_images", "no_image"] for e in good)


def test_a_card_is_a_picture_with_text() -> None:
    exhibit = choose(answers(), 1)[0]
    picture = Image.open(io.BytesIO(card(exhibit, thumbnail(Image.new("RGB", (300, 900), "blue")))))
    assert picture.format == "PNG"
    colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert (0, 0, 255) in colours
    assert (17, 17, 17) in colours  # the question's ink


def test_long_curves_are_thinned_and_keep_their_ends() -> None:
    rows = [{"step": float(step), "loss": 1.0 if step < 5000 else 0.0} for step in range(1, 10001)]
    line = curve(rows, "loss")
    thin = line.thinned()
    assert len(thin.steps) <= 300
    assert thin.steps[-1] == 10000
    assert (thin.values[0], thin.values[-1]) == (1.0, 0.0)
    assert svg(line, "Loss").count(",") < 1500
    assert svg(curve(rows, "nothing"), "Nothing") == ""


def test_the_moving_average_of_a_constant_is_the_constant() -> None:
    line = curve([{"step": float(s), "loss": 2.5} for s in range(100)], "loss")
    assert all(abs(value - 2.5) < 1e-9 for value in line.smoothed().values)


def test_curves_as_png() -> None:
    line = curve([{"step": float(s), "loss": 1 / s} for s in range(1, 20)], "loss")
    assert Image.open(io.BytesIO(png(line, "tiny", "loss"))).size == (770, 440)

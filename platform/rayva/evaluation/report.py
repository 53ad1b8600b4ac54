"""The report: one self-contained HTML page that explains a run's figures in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from rayva.evaluation.curves import Curve, mean, svg
from rayva.evaluation.curves import curve as take_curve
from rayva.evaluation.gallery import CONDITION_NAMES, Exhibit
from rayva.evaluation.gate import Decision
from rayva.evaluation.grounding import CONDITIONS, GATE_TASK
from rayva.evaluation.metrics import Answer, Group, Tally, tally
from rayva.evaluation.report_style import CSS
from rayva.progress import duration

_STAGES = {
    "pretrain": "Stage 1: the projector learns to describe images",
    "finetune": "Stage 2: the model learns to answer",
}
_SPEEDS = {
    "tokens_per_second": ("tokens a second", "{:,.0f}"),
    "padding_share": ("padding", "{:.1%}"),
    "wait_share": ("waiting for data", "{:.1%}"),
}


@dataclass(frozen=True, slots=True)
class Page:
    """All that the report shows.

    Attributes:
        stages: rows of figures by step, for each training stage.
        pictures: data URI of each gallery image by id; an image that is gone is missing.
        steps: name, seconds and folder of each finished step.
        counts: what there was of what.
        reasons: (step, reason, count) of everything that was left out.
        commands: (what for, command line).
    """

    recipe: str
    commit: str
    decision: Decision
    answers: Sequence[Answer]
    stages: Mapping[str, list[dict[str, float]]] = field(default_factory=dict)
    exhibits: Sequence[Exhibit] = ()
    pictures: Mapping[str, str] = field(default_factory=dict)
    steps: Sequence[tuple[str, float, str]] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    reasons: Sequence[tuple[str, str, int]] = ()
    commands: Sequence[tuple[str, str]] = ()


def render(page: Page) -> str:
    """The page as HTML. All text from outside is escaped."""
    sections = (_head(page), _grounding(page), _tables(page), _stages(page), _gallery(page), _work(page))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Rayva: {escape(page.recipe)}</title><style>{CSS}</style></head>\n"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _head(page: Page) -> str:
    passed = page.decision.passed
    verdict = "Promoted: the model answers, and the image is why" if passed else "Not promoted"
    return (
        f"<h1>{escape(page.recipe)}</h1>"
        f'<p class="soft">Rayva evaluation report, code {escape(page.commit[:17])}</p>'
        f'<div class="verdict {"yes" if passed else "no"}"><strong>{verdict}</strong>'
        f"{escape(page.decision.why)}</div>"
    )


def _grounding(page: Page) -> str:
    answers = [answer for answer in page.answers if answer.ask.question.task == GATE_TASK]
    group = tally(answers, "task").get(GATE_TASK)
    if not group:
        return ""
    asked = group["no_image"].total
    return (
        f"<h2>Does it look?</h2><p>Each of {asked:,} questions about pictures that were never seen in "
        "training is asked three times: with its own picture, with another question's picture, and with "
        "none. A model that has only learned the usual answers does as well without the right picture. "
        "The distance between the first bar and the others is what it owes to looking. The thin mark is "
        "the range in which the true share lies with 95 % confidence.</p>"
        f'<div class="bars">{"".join(_bar(name, group[name]) for name in CONDITIONS if name in group)}</div>'
    )


def _bar(condition: Any, count: Tally) -> str:
    low, high = count.interval
    other = "" if condition == "right_image" else " other"
    return (
        f"<div>{CONDITION_NAMES[condition]}</div>"
        f'<div class="bar{other}"><i style="width:{count.accuracy:.2%}"></i>'
        f'<b style="left:{low:.2%};width:{high - low:.2%}"></b></div>'
        f'<div class="num"><strong>{count.accuracy:.1%}</strong></div>'
    )


def _tables(page: Page) -> str:
    grounding = [answer for answer in page.answers if answer.ask.question.task == GATE_TASK]
    others = [answer for answer in page.answers if answer.ask.question.task != GATE_TASK]
    text = ""
    if grounding:
        text += "<h2>By kind of question</h2>" + _table("kind", tally(grounding, "kind"))
    if others:
        text += (
            "<h2>Other tasks</h2><p>These do not decide about promotion.</p>"
            + _table("task", tally(others, "task"))
        )  # fmt: skip
    return text


def _table(what: str, groups: Mapping[str, Group]) -> str:
    used = [name for name in CONDITIONS if any(name in group for group in groups.values())]
    head = "".join(f'<th class="num">{CONDITION_NAMES[name]}</th>' for name in used)
    rows = ""
    for name, group in groups.items():
        questions = max(count.total for count in group.values())
        cells = "".join(_cell(group.get(condition)) for condition in used)
        rows += f'<tr><td>{escape(name)}</td><td class="num">{questions:,}</td>{cells}</tr>'
    return (
        f'<div class="scroll"><table><thead><tr><th>{what}</th><th class="num">questions</th>{head}'
        f"</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cell(count: Tally | None) -> str:
    if count is None:
        return '<td class="num soft">-</td>'
    low, high = count.interval
    span = f'<span class="soft small">{100 * low:.0f}-{100 * high:.0f}</span>'
    return f'<td class="num">{count.accuracy:.1%} {span}</td>'


def _stages(page: Page) -> str:
    cards = "".join(_stage(name, rows) for name, rows in page.stages.items() if rows)
    if not cards:
        return ""
    return (
        "<h2>Training</h2><p>The loss is the mean surprise (negative log-likelihood, in nats) at each token "
        "that the model has to produce. Pale: each step; strong: moving average.</p>"
        f'<div class="pair">{cards}</div>'
    )


def _stage(name: str, rows: list[dict[str, float]]) -> str:
    loss: Curve = take_curve(rows, "loss")
    title = _STAGES.get(name, name)
    facts = [f"{len(rows):,} steps"]
    if loss.values:
        facts.append(f"loss {loss.values[0]:.3g} to {loss.smoothed().values[-1]:.3g}")
    for figure, (words, form) in _SPEEDS.items():
        value = mean(rows, figure)
        if value is not None:
            facts.append(f"{form.format(value)} {words}")
    return (
        f'<div class="card"><h3>{escape(title)}</h3>{svg(loss, f"Loss of {name} by step")}'
        f'<div class="soft small">{escape("; ".join(facts))}</div></div>'
    )


def _gallery(page: Page) -> str:
    if not page.exhibits:
        return ""
    return (
        "<h2>Gallery</h2><p>Test pictures drawn evenly over the kinds of questions, without regard to the "
        "answers. The small picture is the wrong one that was shown in its place.</p>"
        f'<div class="gallery">{"".join(_exhibit(e, page.pictures) for e in page.exhibits)}</div>'
    )


def _exhibit(exhibit: Exhibit, pictures: Mapping[str, str]) -> str:
    question = exhibit.question
    shown = "".join(
        _picture(pictures.get(image_id), place)
        for image_id, place in zip(exhibit.image_ids, ("main", "wrong"), strict=False)
    )
    reference = " / ".join(question.accepted[:3])
    rows = f"<dt>reference</dt><dd>{escape(reference)}</dd>"
    for condition, answer in exhibit.answers.items():
        mark = ("yes-mark", "right") if answer.correct else ("no-mark", "wrong")
        rows += (
            f'<dt>{CONDITION_NAMES[condition]}</dt><dd class="{mark[0]}" title="{mark[1]}">'
            f"{escape(answer.text) or '(nothing)'}</dd>"
        )
    return (
        f'<article class="card"><div class="shown">{shown}</div>'
        f'<p class="question">{escape(question.question)}</p><dl>{rows}</dl></article>'
    )


def _picture(uri: str | None, place: str) -> str:
    caption = "<figcaption>shown instead</figcaption>" if place == "wrong" else ""
    inside = f'<img src="{uri}" alt="">' if uri else '<span class="soft small">picture gone</span>'
    return f'<figure class="{place}">{inside}{caption}</figure>'


def _work(page: Page) -> str:
    steps = "".join(
        f'<tr><td>{escape(name)}</td><td class="num">{duration(seconds)}</td>'
        f"<td><code>{escape(folder)}</code></td></tr>"
        for name, seconds, folder in page.steps
    )
    counts = "".join(
        f'<tr><td>{escape(name)}</td><td class="num">{count:,}</td></tr>'
        for name, count in page.counts.items()
    )
    reasons = "".join(
        f'<tr><td>{escape(step)}</td><td>{escape(reason)}</td><td class="num">{count:,}</td></tr>'
        for step, reason, count in page.reasons
    )
    commands = "".join(
        f"<p>{escape(purpose)}</p><pre>{escape(command)}</pre>" for purpose, command in page.commands
    )
    left_out = (
        f'<div class="scroll"><table><thead><tr><th>step</th><th>left out because</th>'
        f'<th class="num">rows</th></tr></thead><tbody>{reasons}</tbody></table></div>'
        if reasons
        else '<p class="soft">Nothing was left out.</p>'
    )
    return (
        '<h2>Data</h2><div class="pair"><div class="scroll"><table><tbody>'
        f"{counts}</tbody></table></div><div>{left_out}</div></div>"
        '<h2>Steps</h2><div class="scroll"><table><thead><tr><th>step</th><th class="num">took</th>'
        f"<th>folder</th></tr></thead><tbody>{steps}</tbody></table></div>"
        f"<h2>How to go on</h2>{commands}"
    )

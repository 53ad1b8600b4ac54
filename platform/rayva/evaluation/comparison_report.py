"""The report of one evaluation, or of several side by side: one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from rayva.evaluation.bootstrap import Estimate
from rayva.evaluation.comparison import Comparison, Example, Figure, RunRecord, shown
from rayva.evaluation.gallery import data_uri, thumbnail
from rayva.evaluation.records import picture_bytes
from rayva.evaluation.report_style import CSS
from rayva.vision.decode import BadImage, decode_image
from rayva.vision.source import read_image_bytes

_TITLES = {
    "scienceqa": "ScienceQA",
    "llava_bench": "LLaVA-Bench",
    "pope": "POPE",
    "grounding": "Grounding (the gate)",
    "vqa": "Short answers (VQA)",
}
_LONG = 900


def render(comparison: Comparison, pictures: Mapping[str, str]) -> str:
    """The page as HTML; all text from outside is escaped.

    Args:
        pictures: data URI of each picture by its name in the examples' rows.
    """
    names = [run.name for run in comparison.runs]
    title = " / ".join(names)
    tasks = list(dict.fromkeys(figure.task for figure in comparison.figures))
    tasks += [task for task in dict.fromkeys(e.task for e in comparison.examples) if task not in tasks]
    sections = "".join(_task(task, comparison, pictures) for task in tasks)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Rayva: {escape(title)}</title><style>{CSS}</style></head>\n<body><main>"
        f"<h1>{escape(title)}</h1>{_runs(comparison)}{sections or '<p>No task is in every run.</p>'}"
        "</main></body></html>\n"
    )


def load_pictures(comparison: Comparison) -> dict[str, str]:
    """Thumbnails of the examples' pictures as data URIs; one that is gone is missing."""
    wanted: dict[str, RunRecord] = {}
    for example in comparison.examples:
        for run, row in zip(comparison.runs, example.rows, strict=True):
            if row["picture"]:
                wanted.setdefault(row["picture"], run)
                break
    found = {}
    for run in comparison.runs:
        mine = [name for name, owner in wanted.items() if owner is run]
        for name, source in picture_bytes(run, mine).items():
            try:
                content = source if isinstance(source, bytes) else read_image_bytes(source)
                found[name] = data_uri(thumbnail(decode_image(content)))
            except BadImage:
                continue  # the page says that it is gone
    return found


def _runs(comparison: Comparison) -> str:
    rows = "".join(
        f"<tr><td>{escape(run.name)}</td><td><code>{escape(str(run.about.get('model') or ''))}</code></td>"
        f"<td><code>{escape(run.folder)}</code></td></tr>"
        for run in comparison.runs
    )
    several = (
        " Differences are to the first run, over the same questions; a star marks an interval that "
        "excludes zero."
        if len(comparison.runs) > 1
        else ""
    )
    return (
        '<div class="scroll"><table><thead><tr><th>run</th><th>model</th><th>folder</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div><p>Figures are percentages. In brackets are "
        f"{comparison.level:.0%} intervals of {comparison.resamples:,} bootstrap resamples over questions "
        f"(seed {comparison.seed}).{several}</p>"
    )


def _task(task: str, comparison: Comparison, pictures: Mapping[str, str]) -> str:
    figures = [figure for figure in comparison.figures if figure.task == task]
    examples = [example for example in comparison.examples if example.task == task]
    notes = "".join(_notes(run, task) for run in comparison.runs)
    text = f"<h2>{escape(_TITLES.get(task, task))}</h2>"
    if figures:
        text += _table(figures, comparison)
    text += notes
    if examples:
        what = "Where the runs differ" if len(comparison.runs) > 1 else "Examples"
        cards = "".join(_example(example, comparison, pictures) for example in examples)
        text += f'<h3>{what}</h3><div class="gallery">{cards}</div>'
    return text


def _table(figures: list[Figure], comparison: Comparison) -> str:
    names = [run.name for run in comparison.runs]
    heads = [*names, *(f"{name} - {names[0]}" for name in names[1:])]
    head = "".join(f'<th class="num">{escape(name)}</th>' for name in heads)
    rows = ""
    for figure in figures:
        cells = "".join(_cell(value) for value in figure.values)
        cells += "".join(_cell(d, sign=True) for d in figure.differences[1:] if d is not None)
        rows += (
            f"<tr><td>{escape(figure.name.replace('_', ' '))}</td><td>{escape(figure.group or 'all')}</td>"
            f'<td class="num">{figure.questions:,}</td>{cells}</tr>'
        )
    return (
        '<div class="scroll"><table><thead><tr><th>figure</th><th>of</th><th class="num">questions</th>'
        f"{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cell(value: Estimate, sign: bool = False) -> str:
    return f'<td class="num">{escape(shown(value, sign))}</td>'


def _notes(run: RunRecord, task: str) -> str:
    """Counts that a reader of the figures must know of."""
    figures = run.tasks[task].figures if task in run.tasks else {}
    counts: dict[str, Callable[[Any], str]] = {
        "missing": lambda n: f"{n} questions without an answer",
        "left_out": lambda d: ", ".join(f"{count} left out: {reason}" for reason, count in d.items()),
        "parse_failures": lambda n: f"{n} reviews that could not be read",
        "neither_yes_nor_no": lambda n: f"{n} answers say neither yes nor no",
        "why": str,
        "note": str,
    }
    told = [tell(figures[name]) for name, tell in counts.items() if figures.get(name)]
    parsed = figures.get("from_outputs")
    if isinstance(parsed, Mapping) and parsed.get("unparsable"):
        told.append(f"{parsed['unparsable']} answers name no choice")
    return f'<p class="soft small">{escape(run.name)}: {escape("; ".join(told))}</p>' if told else ""


def _example(example: Example, comparison: Comparison, pictures: Mapping[str, str]) -> str:
    first = example.rows[0]
    name = next((row["picture"] for row in example.rows if row["picture"]), None)
    image = ""
    if name is not None:
        uri = pictures.get(name)
        inside = f'<img src="{uri}" alt="">' if uri else '<span class="soft small">picture gone</span>'
        image = f'<div class="shown"><figure class="main">{inside}</figure></div>'
    rows = f"<dt>reference</dt><dd>{_cut(first['reference'])}</dd>"
    for run, row, points in zip(comparison.runs, example.rows, example.points, strict=True):
        mark = {0.0: "no-mark", 1.0: "yes-mark"}.get(-1.0 if points is None else points, "")
        score = "" if points in (None, 0.0, 1.0) else f' <span class="soft small">({points:.2f})</span>'
        note = f'<br><span class="soft small">{_cut(row["note"])}</span>' if row["note"] else ""
        answer = _cut(row["answer"]) or "(nothing)"
        rows += f'<dt>{escape(run.name)}</dt><dd class="{mark}">{answer}{score}{note}</dd>'
    return (
        f'<article class="card">{image}<p class="question">{_cut(first["question"])}</p><dl>{rows}</dl>'
        f'<p class="soft small">{escape(example.question_id)}</p></article>'
    )


def _cut(text: str) -> str:
    return escape(text if len(text) <= _LONG else text[:_LONG] + " ...")

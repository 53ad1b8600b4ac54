"""The report on a run of instruction generation: one self-contained HTML page."""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from rayva.evaluation.report_style import CSS
from rayva.orchestration.generate_costs import told
from rayva.progress import duration

Row = Mapping[str, Any]
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
_FIRST_WORDS = 12
_SECOND_WORDS = 5
_BINS = 24
_GALLERY = 24
_REJECTS = 40
_TEXT = 1200


@dataclass(frozen=True)
class GenerationReport:
    """All that the page shows.

    Attributes:
        summary: the run's figures.
        accepted, rejected: rows as in samples.parquet and rejects.parquet.
        picture: the bytes of the image with this name, or None.
        contexts: the captions that the teacher saw, by image name.
    """

    title: str
    summary: Mapping[str, Any]
    accepted: Sequence[Row]
    rejected: Sequence[Row]
    seconds: float
    picture: Callable[[str], bytes | None] = lambda name: None
    contexts: Mapping[str, Sequence[str]] = field(default_factory=dict)


def render_report(report: GenerationReport) -> str:
    """The page as HTML; all text from outside is escaped."""
    body = "\n".join(
        (_head(report), _reasons(report), _lengths(report), _first_words(report), _gallery(report),
         _rejects(report))
    )  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.title)}</title><style>{CSS}</style></head><body><main>{body}</main></body></html>\n"
    )


def _head(report: GenerationReport) -> str:
    s = report.summary
    kinds = "".join(
        f"<tr><td>{escape(kind)}</td><td class='num'>{count:,}</td></tr>"
        for kind, count in sorted(s["by_kind"].items())
    )
    unfinished = (
        f"<p class='verdict no'><strong>Unfinished</strong>{s['unfinished']:,} samples are still to be asked "
        "for; the same command goes on.</p>"
        if s["unfinished"]
        else ""
    )
    return (
        f"<h1>{escape(report.title)}</h1>"
        f"<p class='soft'>{s['samples']:,} of {s['tasks']:,} samples, "
        f"{s['rejected_answers']:,} rejected answers, "
        f"{s['prompt_tokens']:,} prompt and {s['completion_tokens']:,} answer tokens, {told(s)}, "
        f"{duration(report.seconds)}.</p>{unfinished}"
        f"<table><tr><th>kind</th><th class='num'>samples</th></tr>{kinds}</table>"
    )


def _reasons(report: GenerationReport) -> str:
    reasons = {**report.summary["reasons"]}
    reasons |= {f"context: {why}": n for why, n in report.summary["bad_contexts"].items()}
    if empty := report.summary.get("empty_boxes"):
        reasons["box without an area"] = empty
    reasons |= {f"failed: {why}": n for why, n in report.summary["errors"].items()}
    if not reasons:
        return "<h2>What was rejected</h2><p>Nothing.</p>"
    return "<h2>What was rejected</h2>" + _bars(sorted(reasons.items(), key=lambda item: -item[1]))


def _bars(rows: Sequence[tuple[str, int]]) -> str:
    most = max(count for _, count in rows)
    return (
        "<div class='bars'>"
        + "".join(
            f"<span>{escape(name)}</span>"
            f"<span class='bar'><i style='width:{100 * count / most:.1f}%'></i></span>"
            f"<span class='num'>{count:,}</span>"
            for name, count in rows
        )
        + "</div>"
    )


def _lengths(report: GenerationReport) -> str:
    by_kind: dict[str, list[int]] = {}
    for row in report.accepted:
        words = [len(t["value"].split()) for t in row["conversations"] if t["from"] == "gpt"]
        by_kind.setdefault(row["kind"], []).extend(words)
    figures = "".join(
        f"<figure class='card'><h3>{escape(kind)}</h3>{_histogram(words)}"
        f"<figcaption>words of an answer: median {sorted(words)[len(words) // 2]}, "
        f"most {max(words)}</figcaption></figure>"
        for kind, words in sorted(by_kind.items())
    )
    return f"<h2>Lengths of answers</h2><div class='pair'>{figures}</div>"


def _histogram(values: Sequence[int]) -> str:
    """Counts of `values` in equal bins, as SVG."""
    top = max(values) + 1
    bins = min(_BINS, top)
    counts = Counter(value * bins // top for value in values)
    most, wide = max(counts.values()), _BINS * 12 / bins
    bars = "".join(
        f"<rect x='{i * wide + 1:.1f}' y='{100 - 90 * n / most:.1f}' width='{wide - 2:.1f}' "
        f"height='{90 * n / most:.1f}' fill='var(--accent)'/>"
        for i, n in sorted(counts.items())
    )
    return (
        f"<svg viewBox='0 0 {_BINS * 12} 118' role='img'>{bars}<text x='0' y='114'>0</text>"
        f"<text x='{_BINS * 12}' y='114' text-anchor='end'>{top - 1}</text></svg>"
    )


def _first_words(report: GenerationReport) -> str:
    """How questions begin: the first word, and the second ones behind it (as in the paper's analysis)."""
    begins: dict[str, Counter[str]] = {}
    for row in report.accepted:
        for turn in row["conversations"]:
            if turn["from"] == "human":
                words = _WORD.findall(turn["value"].replace("<image>", "").lower())[:2]
                if words:
                    begins.setdefault(words[0], Counter())[words[1] if len(words) > 1 else ""] += 1
    total = sum(sum(seconds.values()) for seconds in begins.values())
    rows = []
    ordered = sorted(begins.items(), key=lambda item: (-sum(item[1].values()), item[0]))
    for first, seconds in ordered[:_FIRST_WORDS]:
        share = sum(seconds.values()) / total
        parts = "".join(
            f"<i style='position:static;display:inline-block;height:100%;border-radius:0;"
            f"width:{100 * n / total:.2f}%;opacity:{1 - 0.15 * i:.2f}' "
            f"title='{escape(first)} {escape(word)}: {n}'></i>"
            for i, (word, n) in enumerate(seconds.most_common(_SECOND_WORDS))
        )
        common = ", ".join(escape(word) for word, _ in seconds.most_common(3) if word)
        rows.append(
            f"<span>{escape(first)} <span class='soft small'>{common}</span></span>"
            f"<span class='bar' style='display:flex;overflow:hidden'>{parts}</span>"
            f"<span class='num'>{share:.1%}</span>"
        )
    return f"<h2>How questions begin</h2><div class='bars'>{''.join(rows)}</div>"


def _gallery(report: GenerationReport) -> str:
    step = max(1, len(report.accepted) // _GALLERY)
    cards = "".join(_card(report, row) for row in list(report.accepted)[::step][:_GALLERY])
    return f"<h2>Gallery</h2><div class='gallery'>{cards}</div>"


def _card(report: GenerationReport, row: Row) -> str:
    content = report.picture(row["image"])
    picture = ""
    if content is not None:
        kind = "png" if content[:4] == b"\x89PNG" else "webp" if content[:4] == b"RIFF" else "jpeg"
        data = base64.b64encode(content).decode()
        picture = f"<div class='shown'><img class='main' alt='' src='data:image/{kind};base64,{data}'></div>"
    seen = "<br>".join(escape(text) for text in report.contexts.get(row["image"], ()))
    turns = "".join(
        f"<p class='question'>{escape(t['value'].replace('<image>', '').strip())}</p>"
        if t["from"] == "human"
        else f"<p class='small'>{escape(t['value'][:_TEXT])}</p>"
        for t in row["conversations"]
    )
    about = f"<p class='soft small'>{escape(row['id'])}<br>{seen}</p>"
    return f"<article class='card'>{picture}{about}{turns}</article>"


def _rejects(report: GenerationReport) -> str:
    by_reason: dict[str, list[Row]] = {}
    for row in report.rejected:
        by_reason.setdefault(row["reason"], []).append(row)
    each = max(1, _REJECTS // max(1, len(by_reason)))
    rows = "".join(
        f"<tr><td>{escape(reason)}</td><td>{escape(row['id'])}<br>"
        f"<span class='soft'>{escape(row['detail'])}</span></td>"
        f"<td><pre>{escape(row['text'][:_TEXT])}</pre></td></tr>"
        for reason, found in sorted(by_reason.items())
        for row in found[:each]
    )
    if not rows:
        return ""
    head = "<tr><th>reason</th><th>sample</th><th>the teacher's words</th></tr>"
    return f"<h2>Rejected answers</h2><div class='scroll'><table>{head}{rows}</table></div>"

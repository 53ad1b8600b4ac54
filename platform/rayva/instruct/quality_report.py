"""The quality report of a generation: one self-contained HTML page. All text from outside is escaped."""

from __future__ import annotations

import base64
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

_CSS = """
:root { color-scheme: light dark; --line: #8884; --accent: #4a7fd0; }
body { font: 16px/1.6 system-ui, sans-serif; max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { line-height: 1.2; margin: 0; } h2 { margin: 2.5rem 0 .5rem; font-size: 1.25rem; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .3rem 1rem .3rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
.num { text-align: right; font-variant-numeric: tabular-nums; }
.soft { opacity: .7; font-size: .875rem; }
svg { width: 100%; height: auto; display: block; } svg text { font-size: 11px; fill: currentColor; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 1rem; }
.card { border: 1px solid var(--line); border-radius: 10px; padding: 1rem; overflow-wrap: anywhere; }
.card img { max-width: 100%; border-radius: 6px; } .said { white-space: pre-wrap; }
"""
_GALLERY = 24
_REJECTS = 40
_SHOWN = 600
"""Characters of a rejected answer."""
_BINS = 24
_FIRST, _SECOND = 12, 6
"""First words shown, and second words of each."""


@dataclass(frozen=True, slots=True)
class GenerationReport:
    """What the report shows.

    Attributes:
        accepted: number of accepted samples of each kind.
        reasons: number of rejects of each reason, for each kind.
        cost: in US dollars. seconds: wall time.
        samples: rows {id, image, kind, pairs}, with `pairs` a list of Pair, {question, answer} or
            (question, answer); optionally `context` (its rendered text) and `picture` (image bytes).
        rejects: rows {id, kind, reason, detail, text}, each optional.
        images: the folder in which `image` is looked for; None looks for no pictures.
    """

    title: str = "Instruction data"
    teacher: str = ""
    accepted: Mapping[str, int] = field(default_factory=dict)
    reasons: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    seconds: float = 0.0
    samples: Sequence[Mapping[str, Any]] = ()
    rejects: Sequence[Mapping[str, Any]] = ()
    images: str | None = None


def write_report(report: GenerationReport) -> str:
    """The page as HTML, with pictures and diagrams inside."""
    parts = [_head(report), _counts(report), _lengths(report), _first_words(report)]
    parts += [_gallery(report), _rejects(report)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(report.title)}</title><style>{_CSS}</style></head>\n"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _text(value: object) -> str:
    """Escaped, and with what UTF-8 cannot hold spelled out."""
    return escape(str(value).encode("utf-8", "backslashreplace").decode("utf-8"))


def _pairs(sample: Mapping[str, Any]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for pair in sample.get("pairs", ()):
        if isinstance(pair, Mapping):
            found.append((str(pair["question"]), str(pair["answer"])))
        elif isinstance(pair, (tuple, list)):
            found.append((str(pair[0]), str(pair[1])))
        else:
            found.append((pair.question, pair.answer))
    return found


def _head(report: GenerationReport) -> str:
    accepted = sum(report.accepted.values())
    rejected = sum(sum(counts.values()) for counts in report.reasons.values())
    share = f" ({accepted / (accepted + rejected):.1%})" if accepted + rejected else ""
    each = f", ${report.cost / accepted:.5f} a sample" if accepted else ""
    return (
        f"<h1>{_text(report.title)}</h1><p>{accepted:,} samples accepted{share}, {rejected:,} rejected. "
        f"{report.prompt_tokens:,} prompt tokens, {report.completion_tokens:,} completion tokens, "
        f"${report.cost:.4f}{each}, {report.seconds:,.0f} s.</p>"
        + (f'<p class="soft">Teacher: {_text(report.teacher)}</p>' if report.teacher else "")
    )


def _counts(report: GenerationReport) -> str:
    rows = [(kind, "accepted", count) for kind, count in report.accepted.items()]
    for kind, reasons in report.reasons.items():
        rows += [(kind, reason, count) for reason, count in sorted(reasons.items(), key=lambda r: -r[1])]
    body = "".join(
        f'<tr><td>{_text(kind)}</td><td>{_text(reason)}</td><td class="num">{count:,}</td></tr>'
        for kind, reason, count in rows
    )
    return (
        "<h2>Counts</h2><table><thead><tr><th>kind</th><th>outcome</th>"
        f'<th class="num">answers</th></tr></thead><tbody>{body}</tbody></table>'
    )


def _lengths(report: GenerationReport) -> str:
    words: dict[str, list[int]] = {}
    for sample in report.samples:
        found = words.setdefault(str(sample.get("kind", "")), [])
        found += [len(answer.split()) for _, answer in _pairs(sample)]
    charts = "".join(
        f'<p class="soft">{_text(kind)}: {len(values):,} answers, {sum(values) / len(values):.1f} words on '
        f"average, {min(values)} to {max(values)}</p>{_histogram(values)}"
        for kind, values in words.items()
        if values
    )
    return f"<h2>Lengths of answers in words</h2>{charts}" if charts else ""


def _histogram(values: Sequence[int]) -> str:
    width = max(1, -(-(max(values) + 1) // _BINS))
    bins = Counter(value // width for value in values)
    most = max(bins.values())
    bars = ""
    for number in range(max(bins) + 1):
        height = 90 * bins[number] / most
        label = f"{number * width} to {number * width + width - 1} words: {bins[number]}"
        bars += (
            f'<rect x="{number * 33 + 2}" y="{95 - height:.1f}" width="29" height="{height:.1f}" '
            f'fill="var(--accent)"><title>{label}</title></rect>'
            f'<text x="{number * 33 + 2}" y="110">{number * width}</text>'
        )
    return f'<svg viewBox="0 0 800 116" role="img" aria-label="Lengths of answers">{bars}</svg>'


def _first_words(report: GenerationReport) -> str:
    """The first word of questions, and under each the second: width is the share of questions."""
    trees: dict[str, dict[str, Counter[str]]] = {}
    for sample in report.samples:
        tree = trees.setdefault(str(sample.get("kind", "")), {})
        for question, _ in _pairs(sample):
            first, second = [*re.findall(r"[\w']+", question.lower())[:2], "", ""][:2]
            if first:
                tree.setdefault(first, Counter())[second] += 1
    charts = "".join(f"<h3>{_text(kind)}</h3>{_icicle(tree)}" for kind, tree in trees.items() if tree)
    return f"<h2>First words of questions</h2>{charts}" if charts else ""


def _icicle(tree: Mapping[str, Counter[str]]) -> str:
    total = sum(seconds.total() for seconds in tree.values())
    ranked = sorted(tree.items(), key=lambda item: (-item[1].total(), item[0]))[:_FIRST]
    boxes, x = "", 0.0
    for number, (first, seconds) in enumerate(ranked):
        hue = 30 * number
        share = 1000 * seconds.total() / total
        boxes += _cell(first, x, 0, share, hue, seconds.total())
        inner = x
        for second, count in seconds.most_common(_SECOND):
            boxes += _cell(f"{first} {second}".strip(), inner, 42, 1000 * count / total, hue, count, second)
            inner += 1000 * count / total
        x += share
    return f'<svg viewBox="0 0 1000 84" role="img" aria-label="First two words of questions">{boxes}</svg>'


def _cell(name: str, x: float, y: int, width: float, hue: int, count: int, shown: str | None = None) -> str:
    label = name if shown is None else shown
    text = f'<text x="{x + 4:.1f}" y="{y + 24}">{_text(label)}</text>' if width > 7 * len(label) + 6 else ""
    return (
        f'<g><title>{_text(name)}: {count:,}</title><rect x="{x:.1f}" y="{y}" '
        f'width="{max(0.5, width - 1):.1f}" height="40" fill="hsl({hue} 60% 60% / .5)"/>{text}</g>'
    )


def _gallery(report: GenerationReport) -> str:
    step = max(1, len(report.samples) // _GALLERY)
    cards = "".join(_card(sample, report.images) for sample in report.samples[::step][:_GALLERY])
    return f'<h2>Gallery</h2><div class="gallery">{cards}</div>' if cards else ""


def _card(sample: Mapping[str, Any], images: str | None) -> str:
    uri = _thumbnail(sample, images)
    picture = f'<img src="{uri}" alt="">' if uri else '<span class="soft">no picture</span>'
    said = "".join(
        f'<p><strong>{_text(question)}</strong></p><p class="said">{_text(answer)}</p>'
        for question, answer in _pairs(sample)
    )
    context = f'<p class="soft said">{_text(sample["context"])}</p>' if sample.get("context") else ""
    name = f"{sample.get('kind', '')}, {sample.get('id', '')}"
    return f'<article class="card">{picture}<p class="soft">{_text(name)}</p>{context}{said}</article>'


def _thumbnail(sample: Mapping[str, Any], images: str | None) -> str | None:
    """A small JPEG as a data URI; None where there is no picture that can be read."""
    source: io.BytesIO | Path
    if isinstance(sample.get("picture"), bytes):
        source = io.BytesIO(sample["picture"])
    elif images is not None and sample.get("image"):
        source = Path(images) / str(sample["image"])
    else:
        return None
    try:
        with Image.open(source) as picture:
            picture.thumbnail((280, 280))
            sink = io.BytesIO()
            picture.convert("RGB").save(sink, format="JPEG", quality=80)
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
    return "data:image/jpeg;base64," + base64.b64encode(sink.getvalue()).decode()


def _rejects(report: GenerationReport) -> str:
    rows = "".join(
        f"<tr><td>{_text(row.get('kind', ''))}</td><td>{_text(row.get('id', ''))}</td>"
        f"<td>{_text(row.get('reason', ''))}<br>"
        f'<span class="soft">{_text(str(row.get("detail") or "")[:_SHOWN])}</span></td>'
        f'<td class="said">{_text(str(row.get("text") or "")[:_SHOWN])}</td></tr>'
        for row in report.rejects[:_REJECTS]
    )
    if not rows:
        return '<h2>Rejects</h2><p class="soft">Nothing was rejected.</p>'
    return (
        "<h2>Rejects</h2><table><thead><tr><th>kind</th><th>id</th><th>reason</th><th>answer</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )

"""The quality report: complete, well formed, and safe with hostile text."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

from PIL import Image

from rayva.instruct.parse import Pair
from rayva.instruct.quality_report import GenerationReport, write_report

EVIL = '<script>alert("x")</script>&\ud800'


def _report(images: str | None) -> GenerationReport:
    samples = [
        {"id": "1", "image": "1.png", "kind": "conversation", "pairs": [Pair("What is it?", "A dog sits.")]},
        {
            "id": EVIL,
            "image": EVIL,
            "kind": EVIL,
            "context": EVIL,
            "pairs": [{"question": EVIL, "answer": EVIL}],
        },
        {"id": "3", "image": "broken.png", "kind": "detail", "pairs": [("Where is it?", "Here. " * 500)]},
    ]
    rejects = [{"id": EVIL, "kind": EVIL, "reason": "cut", "detail": EVIL, "text": EVIL}, {"text": None}]
    counts = {"conversation": {"cut": 7, EVIL: 1}}
    accepted = {"conversation": 12345}
    return GenerationReport(EVIL, EVIL, accepted, counts, 10, 20, 1.5, 3.0, samples, rejects, images)


def test_everything_is_shown_and_escaped(tmp_path: Path) -> None:
    Image.new("RGB", (900, 300)).save(tmp_path / "1.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page = write_report(_report(str(tmp_path)))
    page.encode("utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert page.count("data:image/jpeg;base64,") == 1
    assert page.count("no picture") == 2
    for shown in ("12,345", "What is it?", "what is: 1", "cut", "$1.5000"):
        assert shown in page
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(charts) == 6
    for chart in charts:
        ET.fromstring(chart)
    assert not re.search(r'(?:src|href)="(?!data:)', page)


def test_an_empty_generation_has_a_report() -> None:
    assert "0 samples accepted" in write_report(GenerationReport())

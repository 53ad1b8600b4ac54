"""The original LLaVA's outputs and data that tests compare with.

Their terms keep them out of this repository. Tests that need them are skipped where they are absent;
`RAYVA_TEST_REFERENCE` names the folder that holds them.
"""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_FOLDER = Path(os.environ.get("RAYVA_TEST_REFERENCE") or ROOT.parent / "shared")

NUMERICS = _FOLDER / "golden" / "numerics"
TEMPLATES = _FOLDER / "golden" / "templates"
TOKENIZER = _FOLDER / "golden" / "tokenizer"
LLAVA_DATA = _FOLDER / "llava_data"
SCIENCEQA = _FOLDER / "scienceqa"
WILD = _FOLDER / "llava_bench_in_the_wild"

CAPTIONS_AND_BOXES = LLAVA_DATA / "caps_boxes_coco2014_val_80.jsonl"


def needs(place: Path) -> pytest.MarkDecorator:
    """Skips a test where this part of the reference is absent."""
    what = f"the original's {place.name}, which are no part of this repository, are not on this machine"
    return pytest.mark.skipif(not place.exists(), reason=what)

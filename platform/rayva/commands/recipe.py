"""Prints a recipe with all its settings, as YAML that --config takes back."""

from __future__ import annotations

import argparse
import json

from rayva.errors import RecipeError
from rayva.recipes import resolve, to_dict, yaml12
from rayva.recipes.named import NAMED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help=f"one of {', '.join(NAMED)}; without it, they are listed")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings to change")
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings to change")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    if options.name is None and options.config is not None:
        raise RecipeError(
            f"--config {options.config} changes a recipe, but none is named.",
            f"give one of {', '.join(NAMED)}",
        )
    if options.name is None:
        print("\n".join(NAMED))
        return 0
    settings = to_dict(resolve(options.name, options.config, options.overrides))
    if options.json:
        print(json.dumps(settings, indent=1))
    else:
        print(yaml12.dump(settings), end="")
    return 0

"""Evaluates a model on tasks; or runs the step `evaluate` of a recipe's run. `--help` tells the rest."""

import sys

import _bootstrap  # noqa: F401  (makes rayva importable)

from rayva.orchestration import exam_entry
from rayva.orchestration.entry import main

if __name__ == "__main__":
    if exam_entry.is_meant(sys.argv[1:]):
        raise SystemExit(exam_entry.main())
    raise SystemExit(main(only="evaluate"))

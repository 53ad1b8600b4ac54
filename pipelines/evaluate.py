"""Evaluates a model on tasks; or runs the step `evaluate` of a recipe's run. `--help` tells the rest."""

import _bootstrap  # noqa: F401  (makes rayva importable)

from rayva.orchestration.exam_entry import main

if __name__ == "__main__":
    raise SystemExit(main())

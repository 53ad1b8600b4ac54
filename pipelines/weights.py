"""Runs the step `weights`, after what it depends on. `--help` tells the rest."""

import _bootstrap  # noqa: F401  (makes rayva importable)

from rayva.orchestration.entry import main

if __name__ == "__main__":
    raise SystemExit(main(only="weights"))

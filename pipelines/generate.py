"""Instruction data from captions and boxes, written by a language-only teacher. `--help` tells the rest."""

import _bootstrap  # noqa: F401  (makes rayva importable)

from rayva.orchestration.generate_entry import main

if __name__ == "__main__":
    raise SystemExit(main())

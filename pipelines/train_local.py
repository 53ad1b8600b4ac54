"""Trains one stage without Ray, alone or under torchrun. `--help` tells the rest."""

import _bootstrap  # noqa: F401  (makes rayva importable)

from rayva.orchestration.local_training import main

if __name__ == "__main__":
    raise SystemExit(main())

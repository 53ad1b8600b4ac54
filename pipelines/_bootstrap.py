"""Makes the package of this very checkout importable, whether or not one is installed.

Imported first by every script here. Ray's workers get the same path in rayva.orchestration.startup.
"""

import sys
from pathlib import Path

_SCRIPTS = Path(__file__).resolve().parent

# Python puts a script's folder first on the path; a script here must not hide a library of its name.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _SCRIPTS]
sys.path.insert(0, str(_SCRIPTS.parent / "platform"))

"""Ray Serve's way to the endpoint: `serve run serve/config.yaml` from the root of the checkout.

`app(args)` builds the application; the arguments are those of `rayva.orchestration.serve.EndpointArgs`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ray import serve

_SOURCE = str(Path(__file__).resolve().parents[1] / "platform")
if _SOURCE not in sys.path:
    # `serve run` imports this file before any runtime environment can set PYTHONPATH.
    sys.path.insert(0, _SOURCE)


def app(args: dict[str, Any]) -> serve.Application:
    """The endpoint: an OpenAI-compatible chat API before autoscaling model replicas."""
    from rayva.orchestration.serve import build_application

    return build_application(args)

"""One finished result in MLflow: an evaluation or a comparison, sent at once and whole."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rayva.provenance import code_version
from rayva.redaction import redact
from rayva.storage import Storage
from rayva.tracking.address import TrackingError, tracking_uri
from rayva.tracking.keys import with_clean_keys
from rayva.tracking.mlflow_tracker import flatten
from rayva.tracking.outbox import Operation, Rejected, ServerAway
from rayva.tracking.server import MlflowServer


def log_report(
    storage: Storage,
    uri: str | None,
    experiment: str,
    name: str,
    *,
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
    artifacts: Sequence[str],
) -> str:
    """Logs a run with its settings, figures and files; returns the store's URI without secrets.

    The same result logged again goes on in the same run. Names that MLflow refuses are mended.

    Args:
        uri: tracking URI; None is a SQLite file under the storage root.
        artifacts: paths relative to the storage root.

    Raises:
        TrackingError: the store cannot be used or reached; nothing else is lost by it.
    """
    place = tracking_uri(uri, storage)
    server = MlflowServer(place, experiment, storage)
    now = time.time_ns() // 1_000_000
    content = json.dumps([name, dict(params), dict(metrics)], sort_keys=True, default=str)
    run = f"report-{hashlib.sha256(content.encode()).hexdigest()[:32]}"
    code = code_version()
    values = {key: redact(v if isinstance(v, str) else json.dumps(v)) for key, v in flatten(params)}
    operations: list[Operation] = [
        {"op": "run", "name": name, "parent": None, "time": now},
        {"op": "tags", "values": {"rayva.commit": str(code["commit"]), "rayva.tree": str(code["tree"])}},
        {"op": "params", "values": with_clean_keys(values)},
        {"op": "metrics", "rows": [(0, with_clean_keys(metrics))], "time": now},
        *({"op": "artifact", "path": path, "folder": path.rpartition("/")[0]} for path in artifacts),
        {"op": "status", "status": "FINISHED", "time": now},
    ]
    try:
        server.connect()
        for operation in operations:
            server.apply({**operation, "run": run})
    except (ServerAway, Rejected) as error:
        mend = "start the tracking server" if isinstance(error, ServerAway) else "mend what it refuses"
        raise TrackingError(
            f"The result cannot be logged to {redact(place)}: {error}",
            f"{mend} and give the same command again; nothing is asked twice",
        ) from error
    return redact(place)

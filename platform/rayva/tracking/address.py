"""Where the tracking store is: checked before any work is done, and shown without its secrets."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from rayva.errors import RayvaError
from rayva.redaction import redact
from rayva.steps import RECIPE
from rayva.storage import Storage

_SERVERS = ("http", "https")
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_EXAMPLES = "use http://host:5000, sqlite:////path/mlflow.db, or leave it out for a store under --storage"


class TrackingError(RayvaError):
    """The tracking store cannot be used as it is given."""


def is_server(uri: str) -> bool:
    """Whether `uri` is a tracking server, which keeps artifacts itself, and not a database."""
    return urlsplit(uri).scheme in _SERVERS


def tracking_uri(given: str | None, storage: Storage) -> str:
    """The store's URI: the given one, else a SQLite file under the storage root.

    Raises:
        TrackingError: no URI for a storage that cannot hold SQLite (not a local disk, or ? or # in its path),
            or a URI that MLflow cannot use.
    """
    if given is None:
        if not storage.is_local:
            raise TrackingError(
                f"MLflow's own store needs a local disk, but the storage is {redact(storage.root)}.",
                "set tracking.uri to a tracking server, for example tracking.uri=http://host:5000",
            )
        if any(sign in storage.root for sign in "?#"):
            # Taken for the end of the path: the file would lie elsewhere. SQLAlchemy knows no quoting.
            raise TrackingError(
                f"MLflow's own store cannot lie in {storage.root}: its path has ? or # in it.",
                "choose another --storage, or set tracking.uri to a tracking server",
            )
        return f"sqlite:///{storage.path('mlflow.db')}"
    return check_uri(given)


def own_store(storage: Storage) -> str | None:
    """A run's own SQLite store, where the run is now; None where its recipe names another store."""
    if not storage.is_local or not storage.exists(RECIPE):
        return None
    recipe = storage.read_json(RECIPE)
    tracking = recipe.get("tracking") if isinstance(recipe, dict) else None
    own = isinstance(tracking, dict) and tracking.get("uri") is None
    return tracking_uri(None, storage) if own else None


def check_uri(given: str) -> str:
    """The URI as it is, if MLflow can use it.

    Raises:
        TrackingError: its scheme is not known, or it names no host, file or folder.
    """
    if given == "databricks" or given.startswith("databricks://"):
        return given
    shown = redact(given)
    parts = urlsplit(given)
    scheme = parts.scheme.partition("+")[0]
    if scheme not in (*_SERVERS, *_DATABASES):
        what = f"its scheme {parts.scheme!r} is not known" if parts.scheme else "it is not a URI"
        raise TrackingError(f"tracking.uri {shown!r} cannot be used: {what}.", _EXAMPLES)
    if scheme in _SERVERS and not parts.hostname:
        raise TrackingError(f"tracking.uri {shown!r} names no host.", _EXAMPLES)
    if scheme == "sqlite":
        _check_sqlite(given, shown)
    return given


def _check_sqlite(uri: str, shown: str) -> None:
    _, marker, path = uri.partition(":///")
    if not marker or not path:
        raise TrackingError(f"tracking.uri {shown!r} names no file.", _EXAMPLES)
    folder = Path(path).parent
    if not folder.is_dir():
        raise TrackingError(f"tracking.uri {shown!r}: there is no folder {folder}.", "make the folder first")

"""MLflow's SQLite file appears whole or not at all.

MLflow makes its tables in dozens of steps and refuses a file in which only some of them were done. A job
that is killed in between would leave a storage that no later job can use. So the file is made under
another name, and gets its own when its schema is complete.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from urllib.parse import urlsplit


def sqlite_file(uri: str) -> Path | None:
    """The file behind a SQLite URI; None for other stores and for databases in memory."""
    if urlsplit(uri).scheme.partition("+")[0] != "sqlite":
        return None
    from sqlalchemy.engine import make_url

    database = make_url(uri).database
    return Path(database) if database and database != ":memory:" else None


def ensure_tables(uri: str) -> None:
    """Makes the SQLite file of `uri` with MLflow's tables where there is none yet; takes seconds then.

    Of several processes that do this at once, one file wins; what killed ones left is removed.
    """
    file = sqlite_file(uri)
    if file is None:
        return
    _remove_leftovers(file)
    if file.exists():
        return
    from mlflow import MlflowClient

    fresh = file.with_name(f".{file.name}.{os.getpid()}.new")
    MlflowClient(tracking_uri=f"sqlite:///{fresh}").search_experiments()
    # Unlike a renaming, this leaves alone the file that another process may have made meanwhile.
    with contextlib.suppress(FileExistsError):
        os.link(fresh, file)
    fresh.unlink()


def _remove_leftovers(file: Path) -> None:
    name = re.compile(re.escape(f".{file.name}.") + r"(\d+)\.new(-journal)?")
    for path in file.parent.iterdir():
        found = name.fullmatch(path.name)
        if found is not None and not _is_alive(int(found[1])):
            path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # one thread of a process tracks: this is left by an earlier process of that number
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

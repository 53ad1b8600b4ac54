"""Finding the error that a person can mend behind what Ray reports."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import TypeGuard

from rayva.errors import RayvaError
from rayva.remote import is_failure
from rayva.storage import remote_error, translate_os_error

_STORAGE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


def user_error(error: BaseException, storage_root: str) -> RayvaError | None:
    """The `RayvaError`, the full or read-only disk, or the remote storage's failure that lies behind `error`;
    None if there is none.

    Ray hands a worker's exception back as one that derives from it but whose text is a whole traceback;
    the original is its `cause`. Ray Train keeps one exception a rank in `worker_failures`.
    """
    for behind in _chain(error):
        if isinstance(behind, RayvaError) and not hasattr(behind, "as_instanceof_cause"):
            return behind
        if isinstance(behind, OSError) and behind.errno in _STORAGE_ERRNOS:
            return translate_os_error(behind, behind.filename or storage_root)
        if "://" in storage_root and _is_of_a_client(behind):
            return remote_error(behind, storage_root)
    return None


def _is_of_a_client(error: BaseException) -> TypeGuard[Exception]:
    """Whether a remote storage's client raised it: Ray Train and Ray Data use one by themselves.

    An `OSError` may be about anything.
    """
    if (
        not isinstance(error, Exception)
        or isinstance(error, OSError)
        or hasattr(error, "as_instanceof_cause")
    ):
        return False
    return is_failure(error)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """`error` and all that led to it, nearest first, each once."""
    queue: list[object] = [error]
    seen: set[int] = set()
    while queue:
        current = queue.pop(0)
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        failures = getattr(current, "worker_failures", None)
        queue += failures.values() if isinstance(failures, dict) else []
        queue += [getattr(current, "cause", None), current.__cause__, current.__context__]

"""What the ranks of one node share: a checkpoint is fetched, and converted, once for all of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from rayva.errors import RayvaError
from rayva.training.checkpoint import DamagedCheckpointError


def node_name() -> str:
    """Ray Train and torchrun number the nodes; each has a name of its own for that."""
    return os.environ.get("NODE_RANK") or os.environ.get("GROUP_RANK") or "0"


def leads_node() -> bool:
    """Whether this rank does for its node what one rank is enough for."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


@dataclass(frozen=True, slots=True)
class _Opened:
    """What a rank tells the others of its try to open a folder; it may not have tried."""

    node: str
    folder: str = ""
    failure: str = ""
    damaged: bool = False


@contextmanager
def node_folder(
    open_: Callable[[], AbstractContextManager[Path]], failed: Callable[[str], RayvaError]
) -> Iterator[Path]:
    """The folder that one rank of this node opens; every rank calls it, and it stays until all have left.

    A rank that does not see the folder opens one itself: what launchers tell of nodes may be wrong, and
    containers of one node may have disks of their own.

    Raises, on all ranks where any rank's `open_` failed:
        DamagedCheckpointError: if that was one.
        RayvaError: `failed` of the reason, else.
    """
    with ExitStack() as stack:
        first = _open(stack, open_) if leads_node() else _Opened(node_name())
        shared = [told.folder for told in _agree(first, failed) if told.folder and told.node == first.node]
        folder = first.folder or next((shown for shown in shared if Path(shown).is_dir()), "")
        second = _Opened(first.node) if folder else _open(stack, open_)
        _agree(second, failed)
        yield Path(folder or second.folder)
        dist.barrier()  # the others may still be reading


def _open(stack: ExitStack, open_: Callable[[], AbstractContextManager[Path]]) -> _Opened:
    try:
        return _Opened(node_name(), folder=str(stack.enter_context(open_())))
    except DamagedCheckpointError as error:
        return _Opened(node_name(), failure=str(error), damaged=True)
    except Exception as error:  # noqa: BLE001  # of any client; one rank alone must not leave the others
        what = error.what if isinstance(error, RayvaError) else str(error)
        return _Opened(node_name(), failure=what or type(error).__name__)


def _agree(own: _Opened, failed: Callable[[str], RayvaError]) -> list[_Opened]:
    """What every rank tells; raises on all of them where one failed."""
    told: list[_Opened | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, own)
    answers = [answer for answer in told if answer is not None]
    failures = sorted((answer for answer in answers if answer.failure), key=lambda answer: not answer.damaged)
    if failures:
        reason = failures[0].failure
        raise DamagedCheckpointError(reason) if failures[0].damaged else failed(reason)
    return answers

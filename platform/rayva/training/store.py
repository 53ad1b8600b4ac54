"""Where checkpoints are stored: one folder each, retention, and what counts as finished.

    checkpoint_RUN_STEP/     RUN is a number that grows with every start, then some letters: two starts
                             never write into one folder, also when both come past the same step

Every rank uploads its own files, its manifest last. A checkpoint without all its manifests is not finished.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from rayva.errors import StorageError
from rayva.storage import Storage
from rayva.training.checkpoint import (
    PROGRESS,
    DamagedCheckpointError,
    Progress,
    is_manifest,
    manifest_name,
    read_progress,
)

logger = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint_(\d+)-[0-9a-f]+_(\d+)")


@dataclass(frozen=True, slots=True)
class StoredCheckpoint:
    """A checkpoint in a storage, finished or not."""

    storage: Storage
    rel: str
    run: int
    step: int

    @property
    def name(self) -> str:
        """Where it is, for messages."""
        return self.storage.uri(self.rel)

    @contextmanager
    def open(self) -> Iterator[Path]:
        """A local copy, gone afterwards: it is as large as the training's state. Itself on local storage.

        Raises:
            DamagedCheckpointError: it is not finished, which is seen before anything large is fetched.
        """
        if not self.storage.is_local and self.progress() is None:
            raise DamagedCheckpointError(f"{self.name} was not finished, or its {PROGRESS} is damaged")
        with self.storage.local_copy(self.rel) as folder:
            yield folder

    def progress(self) -> Progress | None:
        """Where it stands; None where it is not finished: a rank's manifest or the position is missing."""
        names = set(self.storage.list(self.rel))
        if PROGRESS not in names:
            return None
        try:
            with self.storage.local_copy(f"{self.rel}/{PROGRESS}") as file:
                progress = read_progress(file.parent)
        except DamagedCheckpointError:
            return None
        whole = all(manifest_name(rank) in names for rank in range(progress.world_size))
        return progress if whole else None


class CheckpointStore:
    """The checkpoints of a stage under `rel`."""

    def __init__(self, storage: Storage, rel: str, keep_last: int, keep_best: int) -> None:
        self._storage, self._rel = storage, rel
        self._keep_last, self._keep_best = keep_last, keep_best
        self._run = ""

    def start(self) -> None:
        """Gives this start its number; every rank calls it, in the process group."""
        number = 1 + max((checkpoint.run for checkpoint in self.checkpoints()), default=0)
        agreed = [f"{number:04d}-{secrets.token_hex(3)}"]
        dist.broadcast_object_list(agreed, src=0)
        self._run = agreed[0]

    def checkpoints(self) -> list[StoredCheckpoint]:
        """All checkpoints, those of the latest start first, and of each start the newest first."""
        found = []
        for name in self._storage.list(self._rel):
            if match := _NAME.fullmatch(name):
                run, step = int(match[1]), int(match[2])
                found.append(StoredCheckpoint(self._storage, f"{self._rel}/{name}", run, step))
        return sorted(found, key=lambda checkpoint: (checkpoint.run, checkpoint.step), reverse=True)

    def keep(self, folder: Path, step: int) -> None:
        """Uploads what this rank wrote (`put`); rank 0 then removes what is not kept any more.

        What cannot be removed is told, and tried again with the next checkpoint.
        """
        self.put(folder, step)
        if dist.get_rank() == 0:
            try:
                self.prune()
            except (OSError, StorageError) as error:
                logger.warning("checkpoints that are not kept any more could not be removed: %s", error)

    def put(self, folder: Path, step: int) -> None:
        """Uploads what this rank wrote into `folder`, its manifest last.

        Raises:
            OSError, StorageError: that failed. No manifest is left then, nor anything that can be removed.
        """
        target = f"{self._rel}/checkpoint_{self._run}_{step:08d}"
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        written = []
        try:
            for file in sorted(files, key=is_manifest):
                written.append(f"{target}/{file.relative_to(folder).as_posix()}")
                self._storage.upload(file, written[-1])
        except (OSError, StorageError):
            # Room for the next one. Out of reach the files stay, without a manifest; why, is told below.
            with suppress(OSError, StorageError):
                for rel in written:
                    self._storage.delete(rel)
            raise

    def prune(self) -> None:
        """Keeps the last and the best finished checkpoints, and what is newer than the newest of them."""
        keep, passed = self._kept()
        for checkpoint in passed:
            if checkpoint not in keep:
                self._storage.delete(checkpoint.rel)

    def _kept(self) -> tuple[set[StoredCheckpoint], list[StoredCheckpoint]]:
        """What to keep, and all that is not newer than the newest finished one."""
        listed = self.checkpoints()
        finished: list[tuple[StoredCheckpoint, Progress]] = []
        for checkpoint in listed:
            # A later start that came past the same step went on from an earlier one: this was no use to it.
            if not finished or checkpoint.step < finished[-1][0].step:
                progress = checkpoint.progress()
                finished += [(checkpoint, progress)] if progress else []
        if not finished:
            return set(), []
        known = [
            (progress.loss, checkpoint) for checkpoint, progress in finished if progress.loss is not None
        ]
        best = [checkpoint for _, checkpoint in sorted(known, key=lambda item: item[0])][: self._keep_best]
        keep = {*(checkpoint for checkpoint, _ in finished[: self._keep_last]), *best}
        return keep, listed[listed.index(finished[0][0]) :]

"""Settings of Ray Data that the steps share."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from ray.data import DataContext

# Rayva tells of progress itself; Ray Data's own word on it would come between.
_NOISE = ("ray.data._internal.progress", "ray.data._internal.execution.streaming_executor")


@contextlib.contextmanager
def data_context(block_bytes: int) -> Iterator[None]:
    """Settings of Ray Data for the datasets made inside: small blocks, so that stages overlap; no bars."""
    for name in _NOISE:
        logging.getLogger(name).setLevel(logging.ERROR)
    context = DataContext.get_current().copy()
    context.target_max_block_size = block_bytes
    # The exception itself, not Ray Data's wrapper, which loses what it wraps on the way to this process.
    context.raise_original_map_exception = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    with DataContext.current(context):
        yield

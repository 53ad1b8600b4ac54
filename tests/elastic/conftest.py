from __future__ import annotations

from tests.training.conftest import process_group

__all__ = ["process_group"]

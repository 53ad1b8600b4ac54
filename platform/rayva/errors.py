"""Errors that a person can act on: each names the thing at fault and the remedy.

Entry points catch `RayvaError` alone, print it as one paragraph and exit with status 2.
Every other exception is a defect and keeps its traceback.
"""

from __future__ import annotations


class RayvaError(Exception):
    """Base of all errors that are the user's to mend: `what` went wrong and the `remedy`."""

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what, remedy)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what}\n  -> {self.remedy}" if self.remedy else self.what


class RecipeError(RayvaError):
    """A recipe, a configuration file or an override that cannot be used."""


class DataError(RayvaError):
    """Input data that cannot be read at all (single bad rows are quarantined instead)."""


class StorageError(RayvaError):
    """The storage root, or something under it, cannot be written, read or trusted."""


class WeightsError(RayvaError):
    """Model weights that are missing, damaged, of the wrong shape, or unsafe to load."""


class CapacityError(RayvaError):
    """The cluster cannot give what the recipe asks for."""


class TrainingError(RayvaError):
    """Training cannot go on, for example because the loss is not finite."""


class ServingError(RayvaError):
    """The endpoint cannot be started or reached."""

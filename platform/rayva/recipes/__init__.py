"""The typed recipe and the named ones."""

from rayva.recipes.load import from_dict, refuse_secrets, require_runnable, resolve, to_dict
from rayva.recipes.schema import Recipe

__all__ = ["Recipe", "from_dict", "refuse_secrets", "require_runnable", "resolve", "to_dict"]

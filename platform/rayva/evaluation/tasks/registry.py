"""The tasks by name, and their settings from `task.key=value`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import yaml
from pydantic import ValidationError

from rayva.errors import RecipeError
from rayva.evaluation.tasks.base import Place, Task, TaskSettings
from rayva.evaluation.tasks.grounding import Grounding, GroundingSettings
from rayva.evaluation.tasks.llava_bench import LlavaBench, LlavaBenchSettings
from rayva.evaluation.tasks.pope import Pope, PopeSettings
from rayva.evaluation.tasks.scienceqa import ScienceQA, ScienceQASettings
from rayva.evaluation.tasks.vqa import Vqa, VqaSettings

TASKS: dict[str, tuple[Callable[[Any], Task], type[TaskSettings]]] = {
    ScienceQA.name: (ScienceQA, ScienceQASettings),
    LlavaBench.name: (LlavaBench, LlavaBenchSettings),
    Pope.name: (Pope, PopeSettings),
    Grounding.name: (Grounding, GroundingSettings),
    Vqa.name: (Vqa, VqaSettings),
}


def make_tasks(names: Sequence[str], settings: Iterable[str]) -> list[Task]:
    """The named tasks with their settings.

    Raises:
        RecipeError: an unknown task or setting, or a value that does not fit; names the nearest one.
    """
    wanted = list(dict.fromkeys(name.replace("-", "_") for name in names))
    for name in wanted:
        if name not in TASKS:
            raise RecipeError(
                f"there is no task {name!r}{_nearest(name, TASKS)}", f"tasks: {', '.join(TASKS)}"
            )
    given: dict[str, dict[str, Any]] = {name: {} for name in wanted}
    for text in settings:
        task, key, value = _split(text)
        if task not in given:
            raise RecipeError(
                f"{text!r} is for a task that is not asked for", f"--tasks are: {', '.join(wanted)}"
            )
        given[task][key] = value
    return [_make(name, given[name]) for name in wanted]


def _split(text: str) -> tuple[str, str, Any]:
    path, separator, value = text.partition("=")
    task, dot, key = path.partition(".")
    if not separator or not dot or not key:
        raise RecipeError(
            f"{text!r} is no setting", "write task.key=value, for example pope.folder=/data/pope"
        )
    return task.replace("-", "_"), key, value


def _make(name: str, given: dict[str, Any]) -> Task:
    make, settings = TASKS[name]
    for key in given:
        if key not in settings.model_fields:
            raise RecipeError(
                f"{name}.{key} is no setting{_nearest(key, settings.model_fields)}",
                f"settings of {name}: {', '.join(settings.model_fields)}",
            )
    values = {key: _value(settings, key, value) for key, value in given.items()}
    try:
        return make(settings(**values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RecipeError(f"{name}.{place}: {first['msg']}", "see docs/evaluate.md") from error


def _value(settings: type[TaskSettings], key: str, value: str) -> Any:
    """Text where the setting takes text; else what YAML reads."""
    field = settings.model_fields[key]
    if field.annotation in (str, Place | None):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""

"""From a name, a YAML file and `key.sub=value` overrides to one validated recipe."""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Union, get_args, get_origin

import fsspec
import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from rayva import remote
from rayva.errors import RecipeError
from rayva.recipes import yaml12
from rayva.recipes.schema import STAGES, Data, Dataset, Recipe, Scaling, Stage
from rayva.redaction import holds_secret, redact

_NULLS = ("", "~", "null", "Null", "NULL")


def resolve(name: str, config_file: str | None = None, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe `name`, with a YAML file's settings and then `key.sub=value` overrides put over it.

    Raises:
        RecipeError: an unknown recipe or key (the nearest one is named), a value of the wrong type, or a
            file that cannot be read.
    """
    settings = to_dict(_named(name))
    if config_file is not None:
        settings = merge(settings, read_config(config_file))
    for override in overrides:
        settings = merge(settings, parse_override(override))
    return from_dict(settings)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON data; `from_dict` gives the same recipe back."""
    return recipe.model_dump(mode="json")


def from_dict(settings: Mapping[str, Any]) -> Recipe:
    """Validates JSON data as a recipe; all faults are told at once."""
    _refuse_unknown(settings)
    _refuse_broken_text(settings)
    try:
        # JSON mode: strict about types, but a list will do for a tuple.
        return Recipe.model_validate_json(json.dumps(settings), strict=True)
    except ValidationError as error:
        faults = [_explain(fault) for fault in error.errors()]
        raise RecipeError("\n".join(faults), "`rayva recipe NAME` prints every key and its value") from error


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` put over it: sections are merged, all else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = merge(below, value)
        merged[key] = value
    return merged


def read_config(path: str) -> dict[str, Any]:
    """The settings in a YAML or JSON file (local path or fsspec URI), such as the `recipe.json` of a run."""
    try:
        with fsspec.open(path, "r", encoding="utf-8") as file:
            text = file.read()
    except Exception as error:
        what = f"The configuration file {path} cannot be read: {remote.reason(error)}."
        if "://" in path and remote.is_failure(error):
            raise RecipeError(what, remote.remedy(error)) from error
        if isinstance(error, (OSError, ImportError, ValueError)):
            raise RecipeError(what) from error
        raise
    try:
        # As YAML, JSON's two escapes for one character beyond U+FFFF would stay two halves.
        settings = _json(text) if path.endswith(".json") else yaml12.load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        kind = "JSON" if path.endswith(".json") else "YAML"
        raise RecipeError(f"The configuration file {path} is not valid {kind}: {error}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise RecipeError(f"The configuration file {path} holds {_kind(settings)}, not settings by name.")
    _refuse_unknown(settings)
    return settings


def _json(text: str) -> Any:
    """JSON data in which, as in our YAML, no key is given twice."""

    def section(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
        return made

    return json.loads(text, object_pairs_hook=section)


def parse_override(text: str) -> dict[str, Any]:
    """`finetune.lr=2e-5` as nested settings. The value is YAML; text fields take it as it stands."""
    key, equals, raw = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise RecipeError(f"{text!r} is no override.", "write key.sub=value, for example finetune.lr=2e-5")
    fields = _fields()
    if key not in fields:
        raise _unknown(key)
    value = _value(key, raw, _takes_text(fields[key]))
    for part in reversed(key.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]


def _value(key: str, raw: str, is_text: bool) -> Any:
    """What an override sets: YAML. Text is taken as it stands, " #" and ": " included, but null is nothing,
    and what is in quotes loses them."""
    raw = raw.strip()
    if is_text and raw not in _NULLS and not raw.startswith(("'", '"', "[", "{")):
        return raw
    try:
        return yaml12.load(raw)
    except yaml.YAMLError as error:
        if is_text and raw.startswith(("[", "{")):
            return raw  # text that begins with a bracket; a whole list is told as the wrong type
        why = str(error).partition("\n")[0]
        what = f"The value of {key} is not valid YAML: {redact(raw[:200])!r} ({why})."
        raise RecipeError(what, "put it in quotes") from error


def require_runnable(recipe: Recipe) -> None:
    """Checks what must be set before a run can start; a recipe to look at may still lack it.

    Raises:
        RecipeError: names the missing settings, or one that must not be stored.
    """
    data = recipe.data
    needed = {
        "scenes": ("train_scenes", "test_scenes"),
        "emoji": ("emoji_dir",),
        "llava": ("pretrain_json", "finetune_json"),
        "captions": ("captions",),
    }[data.source]
    _check_mix(data)
    _check_scaling(recipe.scaling)
    mixed = [f"{stage}_json" for stage in STAGES if getattr(data, f"{stage}_mix")]
    missing = [f"data.{field}" for field in needed if field not in mixed and not getattr(data, field)]
    if missing:
        raise RecipeError(
            f"The recipe {recipe.name!r} reads its data from {data.source!r} but does not say where or how "
            f"much: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set.",
            "add " + " ".join(f"{key}=..." for key in missing) + " (or use data.source=scenes)",
        )
    for stage in STAGES:
        _check_stage(stage, getattr(recipe, stage))
    refuse_secrets(recipe)


def refuse_secrets(recipe: Recipe) -> None:
    """Refuses passwords and tokens in the URIs of any setting: the recipe is stored and logged with its run.

    Raises:
        RecipeError: names the setting, and where the secret belongs; the secret itself is masked.
    """
    for key, value in _texts(to_dict(recipe)):
        if "://" in value and key != "conversation.system" and holds_secret(value):
            raise RecipeError(
                f"{key} {redact(value)!r} holds a secret (***), which would be kept with every run.",
                _TRACKING_LOGIN if key == "tracking.uri" else _INPUT_LOGIN,
            )


_TRACKING_LOGIN = (
    "leave it out, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
    "MLFLOW_TRACKING_TOKEN, in the environment; for a database, its driver's own, such as PGPASSWORD"
)
_INPUT_LOGIN = (
    "leave it out: credentials belong in the environment of every node (AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, for example) or in fsspec's configuration (~/.config/fsspec/conf.json); or fetch "
    "the file first"
)


def _texts(settings: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text among JSON data with its full key; places in a list are numbers."""
    if isinstance(settings, str):
        yield key, settings
    elif isinstance(settings, Mapping | list):
        inside = settings.items() if isinstance(settings, Mapping) else enumerate(settings)
        for name, value in inside:
            yield from _texts(value, f"{key}.{name}" if key else str(name))


def _check_mix(data: Data) -> None:
    if data.is_mix and data.source != "llava":
        raise RecipeError(
            f"data.{'pretrain' if data.pretrain_mix else 'finetune'}_mix is set, but data.source is "
            f"{data.source!r}.",
            "set data.source=llava; a dataset of the mix may have format: captions",
        )
    for stage in STAGES:
        mix: tuple[Dataset, ...] = getattr(data, f"{stage}_mix")
        for other in (f"{stage}_json", f"{stage}_images"):
            if mix and getattr(data, other):
                raise RecipeError(
                    f"data.{stage}_mix and data.{other} are both set.",
                    f"take data.{other} into the mix, and set it to null",
                )
        labels = [dataset.label for dataset in mix]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise RecipeError(
                f"Several datasets of data.{stage}_mix are called {', '.join(twice)}.",
                "give each a `name` of its own",
            )


def _named(name: str) -> Recipe:
    from rayva.recipes.named import NAMED  # named recipes are built with this module

    if name not in NAMED:
        nearest = difflib.get_close_matches(name, NAMED, n=1, cutoff=0.0)[0]
        raise RecipeError(
            f"There is no recipe {name!r}; the nearest is {nearest!r}.", f"choose one of {', '.join(NAMED)}"
        )
    return NAMED[name]


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _fields(model: type[BaseModel] = Recipe, prefix: str = "") -> dict[str, FieldInfo]:
    """Every key with its full path, sections included."""
    fields: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        fields[prefix + name] = field
        section = _section(field)
        if section is not None:
            fields |= _fields(section, f"{prefix}{name}.")
    return fields


def _takes_text(field: FieldInfo) -> bool:
    kind = field.annotation
    return kind is str or (get_origin(kind) in {Union, types.UnionType} and str in get_args(kind))


def _keys(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in settings.items():
        if "." in key and prefix + key in _fields():
            section, _, name = key.rpartition(".")
            raise RecipeError(
                f"{prefix}{key} stands in one line, as on the command line; in a file, it has a section.",
                f"write `{prefix}{section}:`, and below it, indented, `{name}: ...`",
            )
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{key}.")


def _refuse_unknown(settings: Mapping[str, Any]) -> None:
    fields = _fields()
    for key in _keys(settings):
        section, _, _ = key.rpartition(".")
        # Below a plain value that was wrongly given a mapping, the type error says more.
        if key not in fields and (not section or (section in fields and _section(fields[section]))):
            raise _unknown(key)


def _refuse_broken_text(settings: Mapping[str, Any]) -> None:
    """Half characters: bytes of a command line that are not UTF-8, or an escape that was cut in two."""
    for key, value in _texts(settings):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RecipeError(
                f"{key}: the text {value[:200]!r} is not valid Unicode, at character {error.start + 1}.",
                "write it in UTF-8 (a file whose name is not: rename it)",
            ) from error


def _unknown(key: str) -> RecipeError:
    def likeness(candidate: str) -> float:
        if candidate.endswith(".lr") and "learning" in key:
            candidate = candidate.removesuffix("lr") + "learning_rate"
        plain = key.lower()
        whole = difflib.SequenceMatcher(None, plain, candidate).ratio()
        last = difflib.SequenceMatcher(None, plain.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return whole + last

    nearest = max(_fields(), key=likeness)
    return RecipeError(
        f"The recipe has no key {key!r}; the nearest is {nearest!r}.",
        "`rayva recipe NAME` prints every key and its value",
    )


def _kind(value: Any) -> str:
    names = {
        bool: "true/false", int: "a whole number", float: "a number", str: "text", list: "a list",
        dict: "a section", type(None): "nothing (null)",
    }  # fmt: skip
    return names.get(type(value), type(value).__name__)


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text (put it in quotes)",
    "tuple_type": "a list",
    "model_type": "a section (key.sub)",
    "model_attributes_type": "a section (key.sub)",
    "missing": "a value",
    "finite_number": "a finite number",
    "too_long": "a shorter list",
    "string_pattern_mismatch": "letters, digits, dots, dashes and underscores",
}


def _explain(fault: Any) -> str:
    """One sentence about one of pydantic's faults: the key, what it wants, what it got."""
    key = ".".join(str(part) for part in fault["loc"])
    given, context = fault["input"], fault.get("ctx", {})
    limits = {"greater_than_equal": ("ge", ">="), "greater_than": ("gt", ">"),
              "less_than_equal": ("le", "<="), "less_than": ("lt", "<")}  # fmt: skip
    if fault["type"] == "missing":
        return f"{key} is missing."
    if fault["type"] == "extra_forbidden":  # in a list: elsewhere `_refuse_unknown` comes first
        nearest = difflib.get_close_matches(str(fault["loc"][-1]), Dataset.model_fields, n=1, cutoff=0.0)[0]
        return f"There is no key {key!r}; the nearest is {nearest!r}."
    if fault["type"] == "literal_error":
        expected = f"one of {context['expected']}"
    elif fault["type"] in limits:
        bound, sign = limits[fault["type"]]
        expected = f"a number {sign} {context[bound]}"
    else:
        expected = _EXPECTED.get(fault["type"], fault["msg"])
    return f"{key}: expected {expected}, got {_kind(given)}: {given!r}."


def _check_scaling(scaling: Scaling) -> None:
    if not scaling.cpus_per_worker and not scaling.gpus_per_worker:
        raise RecipeError(
            "A training worker would take neither CPUs nor GPUs: scaling.cpus_per_worker and "
            "scaling.gpus_per_worker are 0.",
            "set one of them, for example scaling.cpus_per_worker=1",
        )
    # Of more than half a GPU, Ray puts one on each.
    if scaling.max_workers > 1 and 0 < scaling.gpus_per_worker <= 0.5:
        raise RecipeError(
            f"scaling.gpus_per_worker={scaling.gpus_per_worker:g} lets Ray put several of the "
            f"{scaling.max_workers} training workers on one GPU, where NCCL refuses to connect them.",
            "set scaling.gpus_per_worker=1, or scaling.workers=1 where there is one GPU",
        )


def _check_stage(name: str, stage: Stage) -> None:
    if name == "pretrain" and stage.train != "projector":
        raise RecipeError(
            f"pretrain.train={stage.train}: stage 1 hands on its projector alone, all else would be lost.",
            "leave pretrain.train=projector; a language model is trained in stage 2",
        )
    if stage.offload and stage.zero == 0:
        raise RecipeError(
            f"{name}.offload needs the optimizer state to be sharded, but {name}.zero is 0.",
            f"add {name}.zero=1 or more",
        )
    if stage.embedding_lr is not None and (stage.train == "projector" or stage.lora.r):
        why = f"{name}.train is projector" if stage.train == "projector" else f"{name}.lora is on"
        raise RecipeError(
            f"{name}.embedding_lr has no effect: the embeddings are not trained, since {why}.",
            f"leave {name}.embedding_lr out",
        )

"""Settings as YAML 1.2 reads them: 2e-5 is a number, `no` and 2024-01-01 are text."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from typing import Any

import yaml

_SCALARS = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*\.?[0-9]*)([eE][-+]?[0-9]+)?", "-+.0123456789"),
)


class _Loader(yaml.SafeLoader):
    """Builds plain data only; a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _fault("a key is a list or a section, not text", key_node)
            if key_node.value in seen:
                raise _fault(f"the key {key_node.value!r} is given twice", key_node)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would not read as text."""


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """PyYAML writes Unicode's own line breaks so that they are read as others, unless they are escaped."""
    style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _text)


def _fault(what: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, what, node.start_mark)


def _decimal(loader: _Loader, node: yaml.ScalarNode) -> int:
    """YAML 1.1 would read 010 as 8."""
    return int(loader.construct_scalar(node).replace("_", ""))


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _SCALARS:
    _firsts = [*_first.replace("\0", "")] + ([""] if "\0" in _first else [])
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _firsts)
_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)


def load(text: str) -> Any:
    """The JSON data in a YAML text.

    Raises:
        yaml.YAMLError: it is not YAML, or holds what JSON cannot: other types, keys that are no text, numbers
            of thousands of digits, or a part that holds itself.
    """
    try:
        value = yaml.load(text, Loader=_Loader)  # a SafeLoader
        _check_plain(value, ())
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        # PyYAML's constructors, about a value that is not what its tag says: `!!bool 7`, `!!timestamp x`.
        raise yaml.YAMLError(f"a value cannot be read: {error}") from error
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    return value


def dump(settings: Mapping[str, Any]) -> str:
    """YAML that `load` reads as the same settings."""
    return yaml.dump(dict(settings), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _check_plain(value: Any, around: tuple[int, ...]) -> None:
    if isinstance(value, dict | list):
        if id(value) in around:
            raise yaml.YAMLError("a part holds itself (an alias within its own anchor)")
        for key, inside in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(value, dict) and not isinstance(key, str):
                raise yaml.YAMLError(f"the key {key!r} is no text: put it in quotes")
            _check_plain(inside, (*around, id(value)))
    elif not isinstance(value, str | int | float | None):
        raise yaml.YAMLError(f"a {type(value).__name__} is no value of a setting")

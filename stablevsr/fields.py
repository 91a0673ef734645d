"""Fields of configuration dataclasses: checks of types and ranges, and conversion to and from JSON types."""

import dataclasses
import sys
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from stablevsr.errors import OptionsError

T = TypeVar("T")

MAX_WIDTH = 2**16  # channels, attention heads, tokens: far above any published network


def shorten(text: str, length: int = 300) -> str:
    """`text`, cut to `length` characters for a message: a damaged file may contain anything."""
    return text if len(text) <= length else f"{text[:length]}..."


def require(ok: bool, owner: object, message: str) -> None:
    """Raises `OptionsError`, naming the class of `owner`, unless `ok`."""
    if not ok:
        raise OptionsError(f"{type(owner).__name__}: {shorten(message)}")


def require_types(owner: Any) -> None:
    """Every field must have its declared type: 1 is no bool, but does for a float. Floats must be finite."""
    for name, hint in typing.get_type_hints(type(owner)).items():
        value = getattr(owner, name)
        expected = "a finite number" if hint is float else getattr(hint, "__name__", hint)
        require(_matches(value, hint), owner, f"{name} is {shorten(repr(value), 100)}, expected {expected}")


def _matches(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_matches(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        options = typing.get_args(hint)
        return isinstance(value, tuple) and all(_matches(item, options[0]) for item in value)
    if typing.get_origin(hint) is dict:
        return isinstance(value, dict) and all(_matches(item, typing.get_args(hint)[1]) for item in value.values())
    if hint is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max  # false for NaN and infinity
    # A subclass only of our own dataclasses, for bool is a subclass of int.
    return type(value) is hint or (
        isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, hint)
    )


def require_positive(owner: object, *names: str) -> None:
    """The named fields, numbers or tuples of numbers, must be above zero."""
    for name in names:
        value = getattr(owner, name)
        values = value if isinstance(value, tuple) else (value,)
        require(len(values) > 0 and min(values) > 0, owner, f"{name} must be positive, got {value}")


def require_size(owner: object, *names: str, limit: int = MAX_WIDTH) -> None:
    """The named fields, numbers or tuples of numbers, must be positive and at most `limit`."""
    require_positive(owner, *names)
    for name in names:
        value = getattr(owner, name)
        largest, what = (max(value), f"the largest of {name}") if isinstance(value, tuple) else (value, name)
        require(largest <= limit, owner, f"{what} is {largest}, expected at most {limit}: no known network needs more")


def require_choice(owner: object, name: str, choices: tuple[str, ...]) -> None:
    """The named field must be one of `choices`."""
    value = getattr(owner, name)
    require(value in choices, owner, f"{name} {value!r} is not supported, only {', '.join(map(repr, choices))} are")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as JSON types."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], values: dict[str, Any]) -> T:
    """The inverse of `to_dict`. Raises `OptionsError` for a key that `cls` does not have."""
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise OptionsError(f"{cls.__name__} has no field {', '.join(unknown)}; the file may come from a newer version")
    build: Callable[..., T] = cls
    return build(**{name: _from_json(hints[name], value) for name, value in values.items()})


def _from_json(hint: Any, value: Any) -> Any:
    if isinstance(value, dict) and typing.get_origin(hint) is not dict:
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        classes = [option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)]
        if not classes:
            raise TypeError(f"an object, {value}, where none is expected")
        # Of several classes, the one that has all the keys. Where there is none, from_dict names the unknown key.
        matching = (cls for cls in classes if set(value) <= {each.name for each in dataclasses.fields(cls)})
        return from_dict(next(matching, classes[0]), value)
    if isinstance(value, list):
        return tuple(_from_json(None, item) for item in value)
    return value

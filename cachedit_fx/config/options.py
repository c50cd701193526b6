"""How a field is declared, once: its type, range, choices and meaning. The checks and the documentation follow from it.

A frozen dataclass declares its fields by `option`, as in `budget: float | None = option(None, doc="...")`, and calls
`settle` in its `__post_init__`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from cachedit_fx.errors import ConfigError, did_you_mean, shown

_KEY = "option"  # In the metadata of a field.
_known: WeakKeyDictionary[type, Mapping[str, Option]] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class Option:
    """The declaration of a field.

    Attributes:
        doc: What the field means, in whole sentences.
        minimum: The smallest value allowed, or of a list the smallest entry.
        above: The same, where this value itself is not allowed.
        maximum: The largest value allowed of a number with a `minimum`.
        choices: The values allowed, or the entries of a list; a function where they are only known at run time.
        not_empty: A list must have at least one entry.
        allowed: What is allowed, in words, where the attributes above do not say all of it.
        accepts: Whether a value is allowed, where they cannot say it.
        convert: Returns the value to store, given the field's name and the value that was passed.
        see: Where the choices are listed, if there are too many for a message.
        structural: Whether graphs are built by it, so that another value recompiles. The other fields are read at run
            time.
        whole_model: Whether it must be the same for all block lists of a model.
        group: The heading in the documentation, of the first field of a group.
        flat: Of a field of a rule: the field of `CacheConfig` that stores it.
        flat_of: Of that field of `CacheConfig`: the rule's field, as in "Budget.coefficients".
        name, type, default: As in the class; `type` is the annotation without " | None".
        is_optional: Whether None is allowed.
    """

    doc: str
    minimum: int | None = None
    above: int | None = None
    maximum: int | None = None
    choices: Sequence[object] | Callable[[], Sequence[object]] = ()
    not_empty: bool = False
    allowed: str = ""
    accepts: Callable[[Any], bool] | None = None
    convert: Callable[[str, Any], Any] | None = None
    see: str = ""
    structural: bool = False
    whole_model: bool = False
    group: str = ""
    flat: str = ""
    flat_of: str = ""
    name: str = ""
    type: str = ""
    default: Any = None
    is_optional: bool = False

    @property
    def values(self) -> str:
        """What is allowed, in words: "an int >= 1, or None"."""
        known = self._choices()
        if self.allowed:
            said = self.allowed
        elif self.type == "bool":
            said = "True or False"
        elif self.is_list:
            entries = " and ".join(map(repr, known)) or _in_words("", self._entry, self.minimum, self.above, plural="s")
            said = f"a list of {entries}{' that is not empty' if self.not_empty else ''}"
        elif known:
            said = f"one of {', '.join(map(repr, known))}"
        else:
            said = _in_words("an " if self._entry == "int" else "a ", self._entry, self.minimum, self.above)
            said += f" and <= {self.maximum}" if self.maximum is not None else ""
        return f"{said}, or None" if self.is_optional else said

    @property
    def is_list(self) -> bool:
        return self.type.startswith("Sequence[")

    def settled(self, label: str, value: Any) -> Any:
        """The value to store.

        Args:
            label: What the error calls the field.

        Raises:
            ConfigError: The value is not allowed.
        """
        if self.convert is not None:
            value = self.convert(label, value)
        elif self.is_list and isinstance(value, Sequence) and not isinstance(value, str):
            value = tuple(value)
        if not self._is_allowed(value):
            hint = did_you_mean(value, self._choices()) if not self.is_list else ""
            see = f"\nSee all names: {self.see}" if self.see else ""
            raise ConfigError(f"cachedit_fx: {label} must be {self.values}, got {shown(value)}.{hint}{see}")
        return value

    def _is_allowed(self, value: Any) -> bool:
        if value is None:
            return self.is_optional
        if self.accepts is not None:
            return self.accepts(value)
        if self.is_list:
            return isinstance(value, tuple) and len(value) >= self.not_empty and all(map(self._is_entry, value))
        known = self._choices()
        if known:
            return any(value == choice and isinstance(value, type(choice) | str) for choice in known)
        return self._is_entry(value)

    def _is_entry(self, value: Any) -> bool:
        if self.is_list and self._choices():
            return value in self._choices()
        if isinstance(value, bool) or not isinstance(value, int if self._entry == "int" else int | float):
            return False
        is_within = self.minimum is None or value >= self.minimum
        is_within &= self.maximum is None or value <= self.maximum
        return is_within and (self.above is None or value > self.above) and math.isfinite(value)

    @property
    def _entry(self) -> str:
        """The type of the value, or of the entries of a list: "int" or "float"."""
        return self.type.removeprefix("Sequence[").removesuffix("]")

    def _choices(self) -> Sequence[object]:
        if self.type == "bool":
            return (True, False)
        return self.choices() if callable(self.choices) else self.choices


def _in_words(article: str, kind: str, minimum: int | None, above: int | None, plural: str = "") -> str:
    noun = "int" if kind == "int" else "number"
    if minimum is not None:
        return f"{article}{noun}{plural} >= {minimum}"
    if above is not None:
        return f"{article}{noun}{plural} > {above}"
    return f"{article}{noun if kind == 'int' else f'finite {noun}'}{plural}"


def option(default: Any, **declared: Any) -> Any:
    """A field of a dataclass with this default, declared by the attributes of `Option`."""
    return dataclasses.field(default=default, metadata={_KEY: Option(**declared)})


def options_of(cls: type) -> Mapping[str, Option]:
    """The declared fields of a dataclass by name. A subclass may set another default and leave the rest as it is."""
    if cls not in _known:
        found = ((field.name, _declaration(cls, field)) for field in dataclasses.fields(cls))
        _known[cls] = {name: declared for name, declared in found if declared is not None}
    return _known[cls]


def _declaration(cls: type, field: dataclasses.Field[Any]) -> Option | None:
    fields = (vars(base).get("__dataclass_fields__", {}).get(field.name) for base in cls.__mro__)
    declared = next((found for found in fields if found is not None and _KEY in found.metadata), None)
    if declared is None:
        return None
    found: Option = declared.metadata[_KEY]
    return dataclasses.replace(
        found,
        name=field.name,
        type=declared.type.removesuffix(" | None"),
        default=field.default,
        is_optional=declared.type.endswith(" | None"),
    )


def settle(instance: Any, prefix: str = "") -> None:
    """Converts and checks every declared field of a frozen dataclass, in its `__post_init__`.

    Args:
        prefix: Precedes the names of the fields in messages.

    Raises:
        ConfigError: A field has a value that is not allowed.
    """
    for name, declared in options_of(type(instance)).items():
        object.__setattr__(instance, name, declared.settled(prefix + name, getattr(instance, name)))

"""The public names and their signatures are the agreed ones, so that a change of them is deliberate."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from tests.public_api import FILE, class_lines, difference, public_api


def test_the_public_names_and_signatures_are_the_agreed_ones():
    changes = difference(FILE.read_text(encoding="utf-8"), public_api())
    assert not changes, f"{changes}\nIf the change is meant (docs/releasing.md): python -m tests.public_api --write"


class Base:
    def shared(self) -> None: ...


@dataclass
class Example(Base):
    first: int
    second: str = "a"
    third: list[int] = field(default_factory=list)
    _hidden: int = 0

    def call(self, x: int, *, y: float | None = None, **rest: object) -> str: ...

    @property
    def length(self) -> int: ...

    @staticmethod
    def of(text: str) -> Example: ...

    def _private(self) -> None: ...


class Kind(enum.Enum):
    ONE = 1


def test_a_class_is_shown_with_its_fields_methods_and_bases():
    assert [*class_lines(Example)] == [
        "class Example(Base)",
        "    first: int",
        "    second: str = 'a'",
        "    third: list[int] = ...",
        "    call(self, x: int, *, y: float | None = None, **rest: object) -> str",
        "    length: property -> int",
        "    staticmethod of(text: str) -> Example",
        "    shared(self) -> None",
    ]
    assert [*class_lines(Kind)] == ["class Kind(Enum)", "    ONE = 1"]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("Fn_compute_blocks: int = 1", "Fn_compute_blocks: int = 2"),
        lambda text: text.replace("disable_cache(pipe_or_adapter: Any)", "disable_cache(pipe: Any)"),
        lambda text: text.replace("    peak_state_bytes: int = 0\n", ""),
        lambda text: text + "cachedit_fx.Decider -> nowhere\n",
    ],
    ids=["default", "parameter", "field", "deprecated name"],
)
def test_a_change_is_shown(change: Callable[[str], str]):
    agreed = FILE.read_text(encoding="utf-8")
    assert difference(agreed, change(agreed)) and not difference(agreed, agreed)

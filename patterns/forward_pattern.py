"""The built-in templates, with the names that cache-dit gives them."""

from __future__ import annotations

import enum

from cachedit_fx.patterns.template import BUILT_IN


class ForwardPattern(enum.Enum):
    """The built-in patterns. The value of a member is its `BlockTemplate`."""

    Pattern_0 = BUILT_IN[0]
    Pattern_1 = BUILT_IN[1]
    Pattern_2 = BUILT_IN[2]
    Pattern_3 = BUILT_IN[3]
    Pattern_4 = BUILT_IN[4]
    Pattern_5 = BUILT_IN[5]

    def __repr__(self) -> str:
        return str(self)  # Messages show it. The repr of the template is long.

    @property
    def In(self) -> tuple[str, ...]:
        """Roles that a block takes."""
        return self.value.takes

    @property
    def Out(self) -> tuple[str, ...]:
        """Roles that a block returns, in order."""
        return self.value.returns

    @staticmethod
    def supported_patterns() -> list[ForwardPattern]:
        return list(ForwardPattern)

"""Templates: the declared contract between one block of a chain and the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cachedit_fx.errors import ConfigError, shown
from cachedit_fx.patterns.blocks import ENCODER, HIDDEN

CACHED_AS = ("residual", "value")


@dataclass(frozen=True, slots=True)
class BlockTemplate:
    """What a block takes and returns, and how its outputs are cached.

    A role in both `takes` and `returns` is a stream. A role only in `takes` is a context, which every block reads. A
    role only in `returns` is emitted: every block computes it anew, and no block reads it.

    Attributes:
        name: The name that messages show.
        takes: Roles that a block receives. The residual of `hidden_states` is the probe.
        returns: Roles that a block returns, in the order of its return statement.
        number: The public pattern number, 0 to 5; None for a template that a user registers.
        streams: Role -> the name of the local variable in the model's code, if it is not the role itself, for example
            `{"hidden_states": "x"}`.
        cached: Role -> "residual" (the default: a reused step adds what the region added the last time) or "value" (a
            reused step uses what the region returned the last time).
        block_class: The template fits only blocks of this class (the class, or its name).
        module_path: The template fits only lists whose path matches this shell-style pattern, for example `*single*`.

    Raises:
        ConfigError: The hidden stream is not both taken and returned, or a field has a value that is not allowed.
    """

    name: str
    takes: tuple[str, ...]
    returns: tuple[str, ...]
    number: int | None = None
    streams: Mapping[str, str] = field(default_factory=dict, hash=False)
    cached: Mapping[str, str] = field(default_factory=dict, hash=False)
    block_class: type | str | None = None
    module_path: str | None = None

    def __post_init__(self) -> None:
        if HIDDEN not in self.returns or HIDDEN not in self.takes:
            raise ConfigError(
                f"cachedit_fx: {self} must take and return {HIDDEN!r}, because its residual is what is reused; "
                f"got takes={list(self.takes)}, returns={list(self.returns)}"
            )
        roles = {*self.takes, *self.returns}
        for name in ("streams", "cached"):
            unknown = sorted(set(getattr(self, name)) - roles)
            if unknown:
                raise ConfigError(
                    f"cachedit_fx: {self}: {name} must name roles of takes and returns, which are {sorted(roles)}, got "
                    f"{unknown}"
                )
        for role, kind in self.cached.items():
            if kind not in CACHED_AS:
                raise ConfigError(
                    f"cachedit_fx: {self}: cached[{role!r}] must be one of "
                    f"{', '.join(map(repr, CACHED_AS))}, got {shown(kind)}"
                )

    @property
    def streams_out(self) -> tuple[str, ...]:
        """Roles that are streams, in the order in which blocks return them."""
        return tuple(role for role in self.returns if role in self.takes)

    @property
    def contexts(self) -> tuple[str, ...]:
        return tuple(role for role in self.takes if role not in self.returns)

    @property
    def emitted(self) -> tuple[str, ...]:
        return tuple(role for role in self.returns if role not in self.takes)

    def __str__(self) -> str:
        return f"pattern {self.number} ({self.name})" if self.number is not None else f"template {self.name!r}"


BUILT_IN = (
    BlockTemplate("dual-stream", (HIDDEN, ENCODER), (HIDDEN, ENCODER), number=0),
    BlockTemplate("dual-stream, encoder first", (HIDDEN, ENCODER), (ENCODER, HIDDEN), number=1),
    BlockTemplate("cross-attention", (HIDDEN, ENCODER), (HIDDEN,), number=2),
    BlockTemplate("hidden-only", (HIDDEN,), (HIDDEN,), number=3),
    BlockTemplate("hidden-only, emits encoder", (HIDDEN,), (HIDDEN, ENCODER), number=4),
    BlockTemplate("hidden-only, emits encoder first", (HIDDEN,), (ENCODER, HIDDEN), number=5),
)

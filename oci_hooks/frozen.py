# SPDX-License-Identifier: Apache-2.0
"""Immutable records.

`dataclasses` takes twice the start-up time of a bare interpreter (it imports inspect), for every container on the
machine. This base class has only the parts that the hooks need: fields in the order of their
annotations, defaults from the class body, equality, no assignment.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, TypeVar

    from typing_extensions import dataclass_transform

    R = TypeVar("R", bound="Frozen")
else:

    def dataclass_transform(**_options):
        """Replace the type checker's decorator, which does nothing at run time."""
        return lambda cls: cls


@dataclass_transform(frozen_default=True)
class Frozen:
    """Base of all records. A subclass lists its fields as annotations."""

    if TYPE_CHECKING:
        known_fields: ClassVar[tuple[str, ...]]
        tag: ClassVar[str]
    else:
        known_fields = ()
        # The name of this kind of record in recordings, independent of the name of its class.
        tag = "record"

    def __init_subclass__(cls) -> None:
        cls.known_fields += tuple(cls.__dict__.get("__annotations__", ()))

    def __init__(self, *values: Any, **named: Any) -> None:
        fields = self.known_fields
        if len(values) > len(fields):
            raise TypeError(f"{type(self).__name__} takes {len(fields)} fields, not {len(values)}")
        named.update(zip(fields, values))
        if len(named) == len(fields) == len(values):
            self.__dict__.update(named)
            return
        for name in fields:
            # A default remains in the class.
            if name not in named and not hasattr(type(self), name):
                raise TypeError(f"{type(self).__name__} lacks {name}")
        unknown = named.keys() - set(fields)
        if unknown:
            raise TypeError(f"{type(self).__name__} has no {', '.join(sorted(unknown))}")
        self.__dict__.update(named)

    @classmethod
    def field_names(cls) -> list[str]:
        """Return the names of the fields, in the order in which they were declared."""
        return list(cls.known_fields)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as a plain dictionary; nested records stay records."""
        return {name: getattr(self, name) for name in self.known_fields}

    def replace(self: R, **changes: Any) -> R:
        """Return a copy with some fields changed."""
        return type(self)(**{**self.as_dict(), **changes})

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable: {name}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Frozen) and type(self) is type(other) and self.as_dict() == other.as_dict()

    def __hash__(self) -> int:
        return hash((type(self), tuple(self.as_dict().values())))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.as_dict().items())})"

# SPDX-License-Identifier: Apache-2.0
"""Parse TOML as Kata's Go library does, which allows some duplicate definitions.

Source: github.com/BurntSushi/toml v1.6.0, parse.go (addContext, setValue, addImplicit, valueInlineTable), lex.go.
"""

from __future__ import annotations

from oci_hooks.host.kata.toml import StrictReader, Table, Tables

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from oci_hooks.host.kata.toml import Keys


class LenientReader(StrictReader):
    """The Go library's rules: a key may not be defined twice, but tables can be extended in ways that TOML forbids.

    implicit_keys, array_keys: the library's marks (parse.go, implicits and keyInfo), which outlive their purpose.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.implicit_keys: set[Keys] = set()
        self.array_keys: set[Keys] = set()
        self.context: Keys = ()

    def open_table(self, keys: Keys, is_array: bool) -> None:
        """Make the table of a header the current one."""
        self.add_context(keys, is_array)
        self.array_keys.discard(keys)

    def put_pair(self, keys: Keys, whole: Keys) -> Any:
        """Read a value, set it in the current table, and return it."""
        outer = self.context
        for key in keys[:-1]:
            self.implicit_keys.add((*self.context, key))
            self.add_context((*self.context, key), False)
        value = self.read_value(whole, False)
        self.set_value(keys[-1], value)
        if not isinstance(value, list):
            self.array_keys.discard((*self.context, keys[-1]))
        self.context = outer
        return value

    def read_array(self, keys: Keys) -> list[Any]:
        """Return an array."""
        self.array_keys.add(keys)
        return super().read_array(keys)

    def read_inline_table(self, keys: Keys, in_array: bool) -> Table:
        """Return an inline table. in_array: an element of an array is first put into an array of tables."""
        outer = self.context
        self.implicit_keys.add(keys)
        self.add_context(keys, in_array)
        table = Table()
        for inner, line in self.list_inline(keys):
            below = table
            for key in inner[:-1]:
                below = below.setdefault(key, Table())
                if not isinstance(below, Table):
                    self.fail(f"{key} is not a table")
            self.context = keys
            below[inner[-1]] = self.put_pair(inner, (*keys, *inner))
            self.lines[(*keys, *inner)] = line
        self.context = outer
        return table

    def add_context(self, keys: Keys, is_array: bool) -> None:
        """Make a table the context, and create missing tables above it (parse.go, addContext)."""
        table = self.values
        for depth, key in enumerate(keys[:-1], 1):
            if key not in table:
                self.implicit_keys.add(keys[:depth])
                table[key] = Table()
            below = table[key]
            table = below[-1] if isinstance(below, Tables) else below
            if not isinstance(table, Table):
                self.fail(f"{key} is already defined, but not as a table")
        self.context = keys[:-1]
        if is_array:
            tables = table.setdefault(keys[-1], Tables())
            if not isinstance(tables, Tables):
                self.fail(f"{keys[-1]} is already defined, but not as an array of tables")
            tables.append(Table())
        else:
            self.set_value(keys[-1], Table())
        self.context = keys

    def set_value(self, key: str, value: Any) -> None:
        """Set a key in the context (parse.go, setValue)."""
        table = self.values
        for part in self.context:
            below = table[part]
            table = below[-1] if isinstance(below, Tables) else below
            if not isinstance(table, Table):
                self.fail(f"{part} is defined twice")
        keys = (*self.context, key)
        if key not in table:
            table[key] = value
            return
        if keys not in self.implicit_keys:
            self.fail(f"{key} is defined twice")
        self.implicit_keys.discard(keys)
        if keys in self.array_keys:
            table[key] = value

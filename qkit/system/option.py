"An option of a solver or a transform: its default, its meaning, and its allowed values."

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qkit.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Option:
    """An option. A value has the type of the default; an integer is also accepted for a float.

    gguf: the default for types of GGUF, where it is another
    least, most: range of a number, ends included; above: exclusive lower limit; choices: permitted names
    """

    default: Any
    summary: str
    gguf: Any = None
    least: float | None = None
    above: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()
    formerly: str = ""

    @property
    def shown(self) -> str:
        """The default, as tables show it."""
        return f"{self.default}" if self.gguf is None else f"{self.default} (GGUF: {self.gguf})"

    def checked(self, name: str, value: Any) -> Any:
        """The value in the type of the default. Raises UsageError for another type or a value out of range."""
        if isinstance(self.default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not type(self.default):
            raise UsageError(f"option '{name}': expected {self._kind}, found {value!r}")
        if self.choices and value not in self.choices:
            raise UsageError(f"option '{name}': expected one of {', '.join(self.choices)}, found {value!r}")
        if (
            (self.least is not None and not value >= self.least)
            or (self.above is not None and not value > self.above)
            or (self.most is not None and not value <= self.most)
        ):
            raise UsageError(f"option '{name}': expected {self._range}, found {value}")
        return value

    @property
    def _kind(self) -> str:
        return "true or false" if isinstance(self.default, bool) else type(self.default).__name__

    @property
    def _range(self) -> str:
        lower = f"more than {self.above:g}" if self.above is not None else f"{self.least or 0:g} or more"
        if self.most is None:
            return lower
        return f"{lower}, to {self.most:g}" if self.above is not None else f"{self.least or 0:g} to {self.most:g}"


Options = dict[str, Option]


def needs_of_options(needs: tuple[tuple[str, str], ...], options: Options, values: dict[str, Any]) -> frozenset[str]:
    """The needs of options whose values differ from their defaults. needs: (option, need) pairs."""
    return frozenset(need for name, need in needs if values.get(name, options[name].default) != options[name].default)


E2E_STEPS = Option(
    default=0,
    summary="steps of end-to-end learning of scales after all blocks (arXiv 2407.11062, section 3.3)",
    least=0,
    formerly="whole",
)
SIGNED = Option(
    default=False,
    summary="negative scales for symmetric integers of up to 4 bits, so that the larger side gets the extra code",
)

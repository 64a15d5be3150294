"""Flags described once: read the same way from the command line, from the environment and by `--help`."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from tgi_gateway.errors import SettingsError

Arity = Literal["one", "optional", "many", "none"]
"""Values after the flag: exactly one; none or one (none: true); one, and the flag may be repeated; none (a switch)."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How text becomes a value."""

    read: Callable[[str], object]
    """Raises ValueError for text that is not allowed."""
    allowed: str
    metavar: str
    arity: Arity = "one"


def _boolean(text: str) -> bool:
    match text.strip().lower():
        case "true" | "1" | "yes" | "on":
            return True
        case "false" | "0" | "no" | "off":
            return False
    raise ValueError


TEXT = Kind(str, "any text", "TEXT")
FILE = Kind(str, "a path", "PATH")
SWITCH = Kind(_boolean, "true or false", "", "none")
YES_NO = Kind(_boolean, "true or false", "true|false", "optional")


def whole(low: int = 0, high: int | None = None) -> Kind:
    """A whole number within ``[low, high]``."""

    def read(text: str) -> int:
        value = int(text)
        if value < low or (high is not None and value > high):
            raise ValueError
        return value

    bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
    return Kind(read, f"a whole number {bounds}", "N")


def number(above: float, most: float = math.inf) -> Kind:
    """A finite number within ``(above, most]``."""

    def read(text: str) -> float:
        value = float(text)
        if not math.isfinite(value) or value <= above or value > most:
            raise ValueError
        return value

    bounds = f"above {above:g}" + (f", at most {most:g}" if math.isfinite(most) else "")
    return Kind(read, f"a number {bounds}", "X")


def one_of(*names: str) -> Kind:
    def read(text: str) -> str:
        if text not in names:
            raise ValueError
        return text

    return Kind(read, " | ".join(names), "NAME")


def comma_list(item: Kind, metavar: str, *, repeatable: bool = False) -> Kind:
    """Items separated by commas; also, if `repeatable`, by giving the flag more than once."""

    def read(text: str) -> tuple[object, ...]:
        return tuple(item.read(part.strip()) for part in text.split(",") if part.strip())

    return Kind(read, f"{item.allowed}, separated by commas", metavar, "many" if repeatable else "one")


@dataclass(frozen=True, slots=True)
class Option:
    """One flag. The environment variable is the name in upper case with underscores."""

    name: str
    """In snake_case, as the field of the settings that holds it."""
    kind: Kind
    help: str
    group: str
    default: object = None
    shown_default: str = ""
    """What `--help` says when the default is found out at start."""
    short: str = ""
    secret: bool = False
    typed: bool = True
    """False: environment only."""
    from_environ: bool = True
    more_variables: tuple[str, ...] = field(default=())
    """Other environment variables of the same meaning, tried in this order."""

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variables(self) -> tuple[str, ...]:
        return (self.name.upper(), *self.more_variables) if self.from_environ else ()

    def value(self, text: str, where: str) -> object:
        """Read `text`, which came from `where`: a flag or a variable."""
        try:
            return self.kind.read(text)
        except ValueError:
            got = "is wrong" if self.secret else f"is {text!r}"
            raise SettingsError(f"Invalid argument: `{where}` {got}; allowed: {self.kind.allowed}") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"Invalid argument: {message}. `{self.prog} --help` lists every flag")


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)


def parser_of(
    options: Iterable[Option], *, prog: str, description: str, epilog: str, groups: Mapping[str, str]
) -> argparse.ArgumentParser:
    """An argparse parser whose results are raw text; `groups` maps a group's title to what is said under it."""
    parser = _Parser(
        prog=prog,
        usage="%(prog)s [serve] [FLAGS] | top | backends | doctor NAME | download MODEL | convert MODEL FILE\n"
        "       %(prog)s --version",
        description=description,
        epilog=epilog,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser._optionals.title = "Help"
    made: dict[str, argparse._ArgumentGroup] = {}
    for option in options:
        if option.group not in made:
            made[option.group] = parser.add_argument_group(option.group, groups.get(option.group))
        if option.typed:
            names = [option.flag, option.short] if option.short else [option.flag]
            made[option.group].add_argument(*names, dest=option.name, default=argparse.SUPPRESS, **_behaviour(option))
    return parser


def _behaviour(option: Option) -> dict[str, Any]:
    """Arguments of `add_argument` beside the names."""
    facts = []
    if option.kind.allowed and "|" in option.kind.allowed and option.kind.arity == "one":
        facts.append(option.kind.allowed)
    if option.variables:
        facts.append(f"env {' or '.join(option.variables)}")
    if option.shown_default:
        facts.append(f"default: {option.shown_default}")
    elif option.kind.arity != "none" and option.default not in (None, (), ""):
        facts.append(f"default: {_shown(option.default)}")
    text = option.help + (f" [{'; '.join(facts)}]" if facts else "")
    behaviour: dict[str, Any] = {"help": text.replace("%", "%%")}
    match option.kind.arity:
        case "none":
            return behaviour | {"action": "store_const", "const": "true"}
        case "optional":
            return behaviour | {"metavar": option.kind.metavar, "nargs": "?", "const": "true"}
        case "many":
            return behaviour | {"metavar": option.kind.metavar, "action": "append"}
        case "one":
            return behaviour | {"metavar": option.kind.metavar}


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def read_flags(
    parser: argparse.ArgumentParser, options: Sequence[Option], argv: Sequence[str], environ: Mapping[str, str]
) -> dict[str, object]:
    """Every option that was given, by name. The command line wins over the environment.

    An empty environment variable counts as not set.
    """
    typed, unknown = parser.parse_known_args(list(argv))
    if unknown:
        raise SettingsError(_unknown(unknown[0], options))
    values: dict[str, object] = {}
    for option in options:
        raw = getattr(typed, option.name, None)
        if raw is not None:
            text = ",".join(raw) if isinstance(raw, list) else str(raw)
            values[option.name] = option.value(text, option.flag)
            continue
        for variable in option.variables:
            if environ.get(variable, ""):
                values[option.name] = option.value(environ[variable], variable)
                break
    return values


def _unknown(argument: str, options: Sequence[Option]) -> str:
    if not argument.startswith("-"):
        return f"Invalid argument: {argument!r} is neither a command nor the value of a flag"
    name = argument.split("=", 1)[0]
    near = difflib.get_close_matches(name, [option.flag for option in options if option.typed], n=1)
    hint = f"did you mean `{near[0]}`?" if near else "`tgi-gateway --help` lists every flag"
    return f"Invalid argument: there is no flag `{name}`; {hint}"

"""Command line flags from a dataclass: `--key=value` for each field, its comment as the help line, TOML presets."""
import argparse
import inspect
import re
import sys
import tomllib
from contextlib import contextmanager
from dataclasses import MISSING, fields
from difflib import get_close_matches
from pathlib import Path


@contextmanager
def user_errors():
    """What the user can mend ends the program with one line and exit code 2, without a traceback."""
    try:
        yield
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print its usage as well
        raise ValueError(message)


def convert(key, value, kind):
    """A flag's or preset's value as the field's type. Raises ValueError."""
    if kind is bool:
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        raise ValueError(f"{key}={value} is not a boolean: use True or False")
    try:
        if isinstance(value, bool) or kind is int and isinstance(value, float):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError):
        raise ValueError(f"{key}={value} is not of type {kind.__name__}") from None


def help_lines(cls):
    """{field: the comment behind it}, from the sources of a dataclass and its bases."""
    lines = {}
    for base in reversed(cls.__mro__[:-1]):
        lines |= dict(re.findall(r"^ +(\w+): \w+.*?  # (.+)$", inspect.getsource(base), re.M))
    return lines


def parse(cls, description, argv=None):
    """argv (default: the command line) -> an instance of the dataclass, and the set of keys that were given."""
    known = {f.name: f for f in fields(cls)}
    texts = help_lines(cls)
    parser = Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="TOML preset; flags beat it")
    for name, f in known.items():
        default = "" if f.default is MISSING else f" (default {f.default!r})"
        text = (texts.get(name, "") + default).replace("%", "%%")
        if f.type is list:  # the arguments without a key
            parser.add_argument(name, nargs="*", default=MISSING, help=text)
            continue
        boolean = {"nargs": "?", "const": True} if f.type is bool else {}
        parser.add_argument(f"--{name}", metavar=f.type.__name__, default=MISSING, **boolean, help=text)
    with user_errors():
        flags, unknown = parser.parse_known_args(argv)
        values = {}
        if flags.config:
            try:
                values = tomllib.loads(Path(flags.config).read_text())
            except ValueError as e:
                raise ValueError(f"{flags.config} is not a TOML file: {e}") from None
        unknown += [f"{key} in {flags.config}" for key in values if key not in known]
        if unknown:
            name = re.split(r"[= ]", unknown[0].lstrip("-"))[0]
            near = get_close_matches(name, known, n=1, cutoff=0)
            raise ValueError(f"unknown key {unknown[0]}: did you mean --{near[0]}? (--help lists all)")
        values |= {name: value for name, value in vars(flags).items() if name in known and value is not MISSING}
        values = {name: convert(name, value, known[name].type) for name, value in values.items()}
        return cls(**values), set(values)

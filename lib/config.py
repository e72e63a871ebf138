"""
Command line flags from a dataclass: `--key=value` for each field, TOML presets, and `--help`.

    @dataclass
    class Config:
        # model                    a heading of --help
        n_layer: int = 4         # blocks (this becomes the line of --n_layer in --help)
        compile: bool | None = None   # True, False, or auto (None)
        runs: list = field(default_factory=list)   # the arguments without a name

    config, given = parse(Config, __doc__)
"""
import argparse
import inspect
import math
import os
import re
import sys
import tomllib
from contextlib import contextmanager
from dataclasses import MISSING, fields
from difflib import get_close_matches

from data.files import read_utf8

BOOLEANS = {"true": True, "false": False, "auto": None, "none": None}
LARGEST = 2 ** 31  # whole numbers stay below: as seeds and sizes they then fit everywhere


@contextmanager
def user_errors(*kinds):
    """
    What the user can mend ends the program with one line and exit code 2, without a traceback.
    kinds: exceptions, by default ValueError and OSError; memory that runs out counts always.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # as in `python sample.py | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (kinds or (ValueError, OSError)) as e:
        quit_with(e)
    except (MemoryError, RuntimeError) as e:  # torch raises RuntimeError, and says it like this
        if isinstance(e, RuntimeError) and not re.search("out of memory|allocate memory", str(e)):
            raise
        quit_with("out of memory: use a smaller batch or a smaller model, or another --device")


def quit_with(message):
    """End the program with one line that says what is wrong."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print its usage as well
        raise ValueError(message)


def convert(name, value, kind):
    """The value of a flag or a preset as the field's type. Raises ValueError."""
    word = str(value).lower()
    if kind in (bool, bool | None):
        if word not in BOOLEANS or kind is bool and BOOLEANS[word] is None:
            also = "" if kind is bool else " or auto"
            raise ValueError(f"{name}={value} is not a boolean: use True or False{also}")
        return BOOLEANS[word]
    try:
        if isinstance(value, bool) or kind is int and isinstance(value, float):
            raise ValueError
        if kind in (str, list) and not isinstance(value, kind):  # they would take anything
            raise ValueError
        converted = kind(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value} is not of type {kind.__name__}") from None
    if kind is float and not math.isfinite(converted):
        raise ValueError(f"{name}={value} is not a finite number: use one")
    if kind is int and abs(converted) >= LARGEST:
        raise ValueError(f"{name}={value} is too large: use a number below {LARGEST}")
    return converted


def from_dict(cls, values):
    """An instance of a dataclass from flags, a preset or JSON, a dict. Raises ValueError."""
    kinds = {field.name: field.type for field in fields(cls)}
    for name in values:
        if name not in kinds:
            raise ValueError(f"{name} is not known")
    return cls(**{name: convert(name, value, kinds[name]) for name, value in values.items()})


def at_least(config, minimum, *names):
    """Raises ValueError where a field of a dataclass is below its minimum."""
    for name in names:
        if not getattr(config, name) >= minimum:  # which nan is not, either
            raise ValueError(f"{name}={getattr(config, name)} must be at least {minimum}")


def below(config, limit, *names):
    """Raises ValueError where a field of a dataclass is not below its limit."""
    for name in names:
        if not getattr(config, name) < limit:
            raise ValueError(f"{name}={getattr(config, name)} must be below {limit}")


def described(cls):
    """{field: (heading, help)}, from the comments in the sources of a dataclass and its bases."""
    found = {}
    for base in reversed(cls.__mro__[:-1]):
        heading = "options"
        for line in inspect.getsource(base).splitlines():
            if match := re.fullmatch(r"    # (.+)", line):
                heading = match[1]
            elif match := re.match(r" +(\w+): \w+.*?  # (.+)$", line):
                found[match[1]] = (heading, match[2])
            elif "def " in line:
                break
    return found


def make_parser(cls, description):
    """A parser with a flag for each field of a dataclass, in the groups that its comments name."""
    parser = Parser(description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", action="append", default=[],
                        help="TOML preset; flags beat it, and a later preset an earlier one")
    texts, groups = described(cls), {}
    for field in fields(cls):
        heading, text = texts.get(field.name, ("options", ""))
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        group = groups[heading]
        if field.type is list:  # the arguments without a name
            group.add_argument(field.name, nargs="*", default=MISSING, help=text)
            continue
        is_switch = field.type in (bool, bool | None)
        if field.default is not MISSING:
            text += f" (default {'auto' if field.default is None else repr(field.default)})"
        group.add_argument(f"--{field.name}", help=text.replace("%", "%%"), default=MISSING,
                           metavar="bool" if is_switch else field.type.__name__,
                           **({"nargs": "?", "const": True} if is_switch else {}))
    return parser


def load_preset(path):
    """The values of a TOML file, a dict. Raises ValueError or OSError."""
    if not path:
        raise ValueError("config is empty: name a TOML file")
    text = read_utf8(path)
    try:
        return tomllib.loads(text)
    except ValueError as e:
        raise ValueError(f"{path} is not a TOML file: {e}") from None


def with_values(argv, known):
    """Arguments, with a value for a switch that would take one without a name: `--paper out/qa1`"""
    nameless = any(field.type is list for field in known.values())
    switches = {f"--{name}" for name, field in known.items() if field.type in (bool, bool | None)}
    return [f"{arg}=True" if nameless and arg in switches and after.lower() not in BOOLEANS else arg
            for arg, after in zip(argv, [*argv[1:], ""])]


def parse(cls, description, argv=None):
    """
    argv (default: the command line) -> an instance of the dataclass, the set of names that were
    given. What is wrong ends the program with one line and exit code 2.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(errors="replace")  # a console may lack a character of a text
    known = {field.name: field for field in fields(cls)}
    with user_errors():
        argv = with_values(sys.argv[1:] if argv is None else argv, known)
        flags, unknown = make_parser(cls, description).parse_known_intermixed_args(argv)
        values = {}
        for path in flags.config:
            preset = load_preset(path)
            unknown += [f"{name} in {path}" for name in preset if name not in known]
            values |= preset
        if unknown:
            name = re.split(r"[= ]", unknown[0].lstrip("-"))[0]
            nameless = [each for each, field in known.items() if field.type is list]
            if near := get_close_matches(name, nameless, n=1):
                raise ValueError(f"unknown key {unknown[0]}: {near[0]} is given without a name: "
                                 "write its value alone (--help lists all)")
            near, = get_close_matches(name, [*{*known} - {*nameless}, "config"], n=1, cutoff=0)
            near = f"config={name}" if name.endswith(".toml") else near
            raise ValueError(f"unknown key {unknown[0]}: did you mean --{near}? "
                             "(--help lists all)")
        for name, value in vars(flags).items():
            if name in known and value is not MISSING and value != []:
                values[name] = value
        return from_dict(cls, values), set(values)

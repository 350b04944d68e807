"""Values from YAML and the command line as the types that are wanted."""

from __future__ import annotations

import re
import types
import typing
from math import isfinite
from typing import Any

import yaml

from pm_llm.errors import PmLlmError

NAMES: dict[Any, str] = {
    float: "a finite number",
    int: "a whole number",
    bool: "true or false",
    str: "a text",
    dict: "a mapping",
    list: "a list",
    type(None): "none",
}


MAX_VALUES = 100_000  # of a configuration, aliases followed

SECRET = re.compile(r"(^|_)(token|password|passwd|secret|api_?key|credentials?)$", re.IGNORECASE)
SECRET_VALUE = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,})")
NO_SECRETS = {"eos_token", "pad_token", "bos_token"}


def cleaned(value: Any, where: str = "the configuration") -> Any:
    """Plain values of YAML, with halves of characters (as JSON writes emojis) put together.

    Raises:
        PmLlmError: If a text is no Unicode, or there is no end of values (YAML lets aliases stand for aliases).
    """
    count = 0

    def walk(x: Any) -> Any:
        nonlocal count
        count += 1
        if count > MAX_VALUES:
            raise PmLlmError(f"{where} holds more than {MAX_VALUES:,} values. Write it without aliases of aliases.")
        if isinstance(x, dict):
            return {walk(key): walk(one) for key, one in x.items()}
        if isinstance(x, list):
            return [walk(one) for one in x]
        return text_of(x, where) if isinstance(x, str) else x

    return walk(value)


def text_of(text: str, where: str) -> str:
    """A text whose surrogate pairs are characters. Raises PmLlmError if half a character is left."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeError as error:
        raise PmLlmError(
            f"{where} holds {ascii(text)[:60]}, which is not valid Unicode. Write it in UTF-8."
        ) from error


def name_of(text: str, what: str) -> str:
    """A name that can be printed, drawn and written: the door through which names come in.

    Raises:
        PmLlmError: If it is empty, longer than 200 characters, or has characters that are not printable.
    """
    found = text_of(text, what)
    if not found.strip() or len(found) > 200 or not found.isprintable():
        raise PmLlmError(
            f"{what} is {ascii(found)[:60]}; it must be of 1 to 200 printable characters, without line breaks."
        )
    return found


def check_no_secrets(values: Any, where: str = "") -> None:
    """Raise PmLlmError if a key or a value is a login: a run's folder and its page show the whole configuration."""
    if isinstance(values, dict):
        for key, value in values.items():
            if isinstance(key, str) and SECRET.search(key) and key not in NO_SECRETS and value is not None:
                raise PmLlmError(
                    f"{where}{key} is a secret, which would be written into the run's folder. Leave it out and set it "
                    "in the environment (HF_TOKEN, or `hf auth login`)."
                )
            check_no_secrets(value, f"{where}{key}.")
    elif isinstance(values, (list, tuple)):
        for value in values:
            check_no_secrets(value, where)
    elif isinstance(values, str) and SECRET_VALUE.search(values):
        raise PmLlmError(
            f"{where.rstrip('.') or 'the configuration'} holds what looks like a login token, which would be written "
            "into the run's folder. Leave it out and set it in the environment."
        )


class _Loader(yaml.SafeLoader):
    """YAML 1.1, in which `1e-3` is a number too, as in YAML 1.2."""


class _Dumper(yaml.SafeDumper):
    """The same for writing: a text `1e-3` is put into quotes."""


for _one in (_Loader, _Dumper):
    _one.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def read_yaml(text: str) -> Any:
    """What a YAML text says. Raises yaml.YAMLError, or ValueError for a date that there is not."""
    return yaml.load(text, Loader=_Loader)


def write_yaml(values: Any) -> str:
    """The text that :func:`read_yaml` reads as `values`, keys in their order."""
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def extra_value(value: Any, hint: Any, key: str) -> Any:
    """`value` for a field of another library: converted if that is of plain types, else as it is.

    Raises:
        PmLlmError: If the field is of plain types and `value` of none of them.
    """
    kinds = {typing.get_origin(one) or one for one in typing.get_args(hint) or (hint,)}
    if kinds <= {bool, int, float, str, type(None)}:
        return convert(value, hint, key)
    return value


def convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as the annotated type; an int is a float too.

    Raises:
        PmLlmError: If it is of no type that `hint` allows; `key` is what it is called.
    """
    if hint is Any:
        return value
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if is_union else (hint,)
    if type(None) in options and (value is None or value == "none"):
        return None
    for one in options:
        plain = typing.get_origin(one) or one
        if plain is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                number = float(value)
            except OverflowError:
                continue
            if not isfinite(number):
                continue
            return number
        if plain is int and isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, plain) and not (plain is int and isinstance(value, bool)):
            inner = typing.get_args(one)
            if plain is list and inner:
                return [convert(x, inner[0], f"{key}: element {i}") for i, x in enumerate(value, start=1)]
            if plain is dict and inner:
                return {
                    convert(name, inner[0], f"{key}: key"): convert(x, inner[1], f"{key}: {name!r}")
                    for name, x in value.items()
                }
            return value
    names = " or ".join(NAMES.get(typing.get_origin(one) or one, str(one)) for one in options)
    raise PmLlmError(f"{key} is {value!r}; it must be {names}.")

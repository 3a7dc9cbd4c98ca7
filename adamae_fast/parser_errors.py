"""What the parser of options and recipes finds wrong, in the user's words: key, value and what may stand there."""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterable

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list",
    "tuple": "a list of values",
    "dict": "keys and values",
    "NoneType": "null",
}
_KEY = re.compile(r'(?:Problem in .*?: )?Parser key "(?P<key>[^"]+)":\s*(?P<rest>.*)', re.DOTALL)
_VALUE = re.compile(r"(?:Got value|Given value): (?P<value>.*)\Z", re.DOTALL)
_EXPECTED = re.compile(r"Expected an? (.+?)(?:\. Got value.*|)$", re.MULTILINE)


def in_plain_words(error: Exception) -> str:
    """``mask.strategy=foo: choose adaptive, random, tube or frame``; the error's own text where it says something else.

    The text is jsonargparse's: if a later version words it otherwise, users see that.
    """
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        remedy = "; choose another name" if isinstance(error, FileExistsError) else ""
        return f"{error.filename}: {error.strerror.lower()}{remedy}"
    text = str(error)
    found = _KEY.search(text)
    if found is None:
        return text
    before, key, rest = text[: found.start()], found["key"], found["rest"]
    if group := re.match(r"Unable to load config ['\"](.*?)['\"]", rest):
        return f"{before}{key}={group[1]}: this is a group of keys; set one of them, as in --{key}.KEY VALUE"
    if missing := re.match(r"File does not exist: ['\"](.*?)['\"]", rest):
        return f"{before}{key}={missing[1]}: there is no such file"
    value, kinds = _VALUE.search(rest), [_plain_kind(kind) for kind in _EXPECTED.findall(rest)]
    if value is None or not kinds:
        return text
    return f"{before}{key}={value['value'].strip()}: choose {', or '.join(dict.fromkeys(kinds))}"


def similar_option(error: Exception, options: Iterable[str]) -> str:
    """``; did you mean --data.manifest?`` for an error about ``--manifest``; empty where nothing is similar."""
    unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", str(error))
    similar = difflib.get_close_matches(unknown[1], options, n=1) if unknown else []
    return f"; did you mean {similar[0]}?" if similar else ""


def _plain_kind(kind: str) -> str:
    """A type, as jsonargparse prints it, in words."""
    if choices := re.match(r"(?:typing\.)?Literal(\[.*\])$", kind):
        *others, last = map(str, ast.literal_eval(choices[1]))
        return f"{', '.join(others)} or {last}" if others else last
    if length := re.match(r"tuple with (\d+) elements", kind):
        return f"a list of {length[1]} values"
    name = re.match(r"<class '(?:\w+\.)*(\w+)'>", kind)
    return _KINDS.get(name[1], name[1]) if name else kind

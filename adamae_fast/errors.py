"""Errors that end a command with one line in place of a traceback. Wrong input is a ValueError everywhere."""


class RunStoppedError(RuntimeError):
    """A run had to stop for a reason that its user can act on, such as too many unreadable videos."""


class ToldByFirstError(RunStoppedError):
    """What stops the run on all processes is told by the first one; this one ends in silence."""


def require(condition: bool, key: str, value: object, remedy: str) -> None:
    """Raise the one kind of error a user of the configuration sees: the key, its value and what to do."""
    if not condition:
        raise ValueError(f"{key}={value!r}: {remedy}")

"""Errors that end a command with one line in place of a traceback. Wrong input is a ValueError everywhere."""


class RunStoppedError(RuntimeError):
    """A run had to stop for a reason that its user can act on, such as too many unreadable videos."""

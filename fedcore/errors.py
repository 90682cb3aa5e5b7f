"""Errors that a person can act on.

Messages say what was found, what was expected and what to do.
"""

__all__ = ["FedcoreError", "RunError", "SettingsError", "TooFewReports"]


class FedcoreError(Exception):
    """Base of every error of fedcore.

    The command line prints its message alone and exits with `exit_status`.
    """

    exit_status = 1


class SettingsError(FedcoreError):
    """The settings, or a file they name, cannot be used as given."""

    exit_status = 2


class RunError(FedcoreError):
    """The run started well and could not go on."""


class TooFewReports(RunError):
    """Fewer clients reported than the round needs.

    The loop leaves the server as it was and goes on.
    """

"""Errors of steerfast. Each message names the argument, the expected value and the actual value."""

from __future__ import annotations


class SteerfastError(Exception):
    """Base class of all errors that steerfast raises on purpose."""


class ProfileError(SteerfastError, ValueError):
    """A profile is missing, corrupt, inconsistent, or does not belong to the model."""


class PromptError(SteerfastError, ValueError):
    """A prompt set cannot be used: empty, one-sided, identical, too long, unreadable."""


class ArchitectureError(SteerfastError, ValueError):
    """The model cannot be steered: no decoder layers found, or its outputs have another shape."""


class OutputError(SteerfastError, OSError):
    """A result cannot be written to the requested place."""


class GuardError(SteerfastError, ValueError):
    """A guard cannot run: a limit is out of range, or a scorer or critic is missing or of another model."""


class JudgeError(SteerfastError, RuntimeError):
    """A judge of answers is unknown, cannot be loaded, or cannot be reached."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or the name of an error without text."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__

"""Errors of steerfast. Each message names the argument, what was expected, and what came."""

from __future__ import annotations


class SteerfastError(Exception):
    """Base class of every error that steerfast raises on purpose."""


class ProfileError(SteerfastError, ValueError):
    """A profile is missing, corrupt, inconsistent, or does not belong to the model."""


class PromptError(SteerfastError, ValueError):
    """A prompt set cannot be used: empty, one-sided, identical, too long, unreadable."""


class ArchitectureError(SteerfastError, ValueError):
    """The model cannot be steered: no decoder layers found, or its outputs have another shape."""


class OutputError(SteerfastError, OSError):
    """A result cannot be written where it was asked for."""


class GuardError(SteerfastError, ValueError):
    """A guard cannot run as asked: a limit out of range, a scorer or critic that is missing or of another model."""


class JudgeError(SteerfastError, RuntimeError):
    """A judge of answers is unknown, cannot be loaded, or cannot be reached."""

"""Which release of a package is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def installed_version(package: str) -> str | None:
    """The installed release of a distribution, None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None

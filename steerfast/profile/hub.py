"""Profiles on the HuggingFace hub: one file in a repository, at the place beside a model's weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from steerfast.errors import OutputError, ProfileError, first_line

PROFILE_FILE = Path("steerfast", "profile.safetensors")
"""Where a model's folder or repository has its profile, apart from the files that engines load as weights."""

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def find(name: str, **options: Any) -> Path:
    """Return the file of a profile: `name` is the file, a folder with `PROFILE_FILE`, or a hub repository.

    Args:
        options: of the hub: revision, token, cache_dir, local_files_only.

    Raises:
        ProfileError: the hub has no such file, or cannot be reached.
    """
    path = Path(name)
    if path.is_dir():
        return path / PROFILE_FILE
    if path.exists() or not _REPOSITORY.fullmatch(name) or name.endswith(".safetensors"):
        return path
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, PROFILE_FILE.as_posix(), **options))
    except _faults() as error:
        raise ProfileError(
            f"profile: expected a file, or a hub repository with {PROFILE_FILE.as_posix()}, got {name!r} "
            f"({first_line(error)})"
        ) from None


def upload(data: bytes, repository: str, *, message: str, **options: Any) -> str:
    """Write `PROFILE_FILE` of a hub repository, which is made where there is none; return the commit's address.

    Args:
        options: of the hub: private, token, revision.

    Raises:
        OutputError: no token, no permission, no network, or a name that is none.
    """
    from huggingface_hub import HfApi

    private, revision = options.pop("private", None), options.pop("revision", None)
    try:
        api = HfApi(**options)
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_file(
            path_or_fileobj=data,
            path_in_repo=PROFILE_FILE.as_posix(),
            repo_id=repository,
            revision=revision,
            commit_message=message,
        )
    except _faults() as error:
        raise OutputError(
            f"output: cannot write to the hub repository {repository!r} ({first_line(error)}); log in by "
            "`hf auth login`, or set HF_TOKEN"
        ) from None
    return str(done.commit_url)


def _faults() -> tuple[type[BaseException], ...]:
    """Return the errors of the hub's client: its own, those of its transport, and invalid names."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    return (OSError, ValueError, EntryNotFoundError, *HfHubHTTPError.__bases__)

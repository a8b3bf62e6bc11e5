"""Models on the Hugging Face Hub, by their `owner/name`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from latentae.errors import MissingDependencyError, ModelError

__all__ = ["hub_id", "one_line", "snapshot"]

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def hub_id(path: str | Path) -> str | None:
    """`path` as the name of a repository on the Hub, or None where it can't be one: it is there, or its parent folder is."""
    path = Path(path)
    name = path.as_posix()
    if not _ID.fullmatch(name) or path.exists() or path.parent.exists():
        return None
    return name


def snapshot(name: str, files: Sequence[str]) -> Path:
    """The folder that holds `files` of a repository, as far as it has them; fetched, or from the Hub's cache.

    Raises:
        ModelError: there is no such repository, it is private, or the Hub can't be reached.
        MissingDependencyError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingDependencyError(
            f"{name} is read from the Hub by huggingface_hub; pip install huggingface_hub"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # the Hub's client has errors of its own, its transport's and the system's
        raise ModelError(
            f"{name} is no path here, and the Hub did not give it ({one_line(error)}); check the name, the line, or log in with "
            "`hf auth login`"
        ) from error


def one_line(error: Exception, longest: int = 200) -> str:
    """An error as its type and the beginning of its text."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= longest else text[:longest] + '...'}"

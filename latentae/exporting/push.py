"""Uploading an exported folder to the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from latentae.errors import MissingDependencyError, OutputError, RecipeError
from latentae.exporting.card import card_for_hub
from latentae.models.hub import one_line
from latentae.progress import say

__all__ = ["check_repository", "push"]


def check_repository(name: str | None) -> None:
    """Refuse what can't be a repository's name, before any work.

    Raises:
        RecipeError: it is not `owner/name`.
    """
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII):
        raise RecipeError(
            f"push_to_hub is {name!r}, expected owner/name of a repository on the Hugging Face Hub"
        )


def push(folder: Path, card: str, repository: str) -> str:
    """Upload a finished folder, its card with the repository's name in the snippets; files that are there already are not sent again.

    A repository that is not there yet is made, with the visibility that the account's settings say.

    Returns:
        The repository's address.

    Raises:
        OutputError: not logged in, no right to write, or no connection.
        MissingDependencyError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise MissingDependencyError(
            "uploading needs huggingface_hub; pip install huggingface_hub"
        ) from error
    text = card_for_hub((folder / card).read_text(encoding="utf-8"), folder.name, repository)
    api = HfApi()
    try:
        address = str(api.create_repo(repository, exist_ok=True))
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            ignore_patterns=[card],
            commit_message="Upload by latentae export",
        )
        api.upload_file(
            repo_id=repository, path_in_repo=card, path_or_fileobj=text.encode(), commit_message="Model card"
        )
    except Exception as error:  # the Hub's client has errors of its own, its transport's and the system's
        raise OutputError(
            f"could not upload to {repository} ({one_line(error)}); {folder} is whole: log in with `hf auth login` and run the same "
            "command again"
        ) from error
    say(f"export: uploaded {folder} to {address}")
    return address

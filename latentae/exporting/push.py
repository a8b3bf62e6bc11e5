"""Upload an exported folder to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from latentae.errors import OutputError, first_line
from latentae.exporting.card import card_for_hub
from latentae.progress import say

__all__ = ["push"]


def push(folder: Path, card: str, repository: str) -> str:
    """Upload a finished folder; the snippets of its card get the repository's name.

    A missing repository is created with the account's default visibility. Files that are already
    there are not sent again.

    Returns:
        The repository's address.

    Raises:
        OutputError: not logged in, no write access, or no connection.
    """
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
    except Exception as error:  # of the Hub's client, its transport or the system
        raise OutputError(
            f"could not upload to {repository} ({type(error).__name__}: {first_line(error)}); "
            f"{folder} is complete: "
            "log in with `hf auth login` and run the same command again"
        ) from error
    say(f"export: uploaded {folder} to {address}")
    return address

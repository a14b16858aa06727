"""A checkpoint's folder to a hub, through huggingface_hub: its own files and nothing that lies beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerskip.checkpoint.contents import checkpoint_files, matching
from layerskip.checkpoint.resolve import HUB_ID
from layerskip.errors import UserError
from layerskip.reading import reason

CODE = "custom_generate"  # what transformers runs, beside the model


def pushed(folder: Path, repo: str, *, private: bool, message: str) -> dict[str, Any]:
    """Make the repository if it is not there and upload the folder; tell its address and the files, in bytes.

    Raises: UserError for a name that is none, or whatever the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    if not HUB_ID.fullmatch(repo):
        raise UserError(f"{repo!r} is no name of a repository", "give one of the form org/name")
    found = [*checkpoint_files(folder), *matching(folder / CODE, ("*.py", "requirements.txt"))]
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}
    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(
            folder_path=folder, repo_id=repo, allow_patterns=[*files], commit_message=message
        )
    except LocalTokenNotFoundError as error:
        raise UserError("you are not logged in to the hub", "run `hf auth login`, or set HF_TOKEN") from error
    except Exception as error:  # whatever the hub, its library or the network say
        told = "may your token write there? `hf auth whoami` tells whose it is"
        raise UserError(f"cannot upload to {repo}: {reason(error)}", told) from error
    return {"repo": repo, "url": str(done.commit_url), "files": files}

"""Staging with the network: commits, models and data sets from the hub. ``python -m launcher.stage.fetch REQUEST``."""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from launcher.errors import ActionError, UsageError
from launcher.serve import Say, serve
from launcher.stage.formats import Place
from launcher.stage.records import no_column
from launcher.stage.sources import check_model, tokenizer_sha
from launcher.supported import TOKENIZER_FILES

MODEL_FILES = ("*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", *TOKENIZER_FILES)
NOT_MODEL_FILES = ("*/*", "consolidated*")
"""Other formats of the same weights, which some repositories hold beside them."""


def fetch(request: dict[str, Any], say: Say) -> dict[str, Any]:
    """Carry out a request in its folder and give the facts."""
    return {"resolve": resolve, "model": fetch_model, "data": fetch_data}[request["task"]](request, say)


def resolve(request: dict[str, Any], say: Say) -> dict[str, Any]:
    """The commit that a branch, tag or commit of a repository is now."""
    from huggingface_hub import HfApi

    kind, name, revision = request["kind"], request["name"], request["revision"]
    with _hub_errors(kind, name, revision):
        api = HfApi()
        info = api.model_info(name, revision=revision) if kind == "model" else api.dataset_info(name, revision=revision)
    say(f"{name}: {revision} is commit {info.sha}")
    return {"commit": info.sha}


def fetch_model(request: dict[str, Any], say: Say) -> dict[str, Any]:
    """Config, safetensors and tokenizer of a model at a commit. A download that was killed goes on where it was."""
    from huggingface_hub import snapshot_download

    folder, name, commit = Path(request["folder"]), request["name"], request["commit"]
    say(f"downloading {name} at {commit}")
    with _hub_errors("model", name, commit):
        snapshot_download(
            name, revision=commit, local_dir=str(folder), allow_patterns=list(MODEL_FILES), ignore_patterns=list(NOT_MODEL_FILES)
        )
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the hub's notes about its own downloads
    check_model(folder, "model.name")
    return {
        "tokenizer_sha": tokenizer_sha(folder),
        "name": name,
        "commit": commit,
        "versions": {"huggingface_hub": version("huggingface_hub")},
    }


def fetch_data(request: dict[str, Any], say: Say) -> dict[str, Any]:
    """The columns of a data set's training split and, where it has one, of its evaluation split, at a commit, under the names of
    ``formats.COLUMNS``.
    """
    from datasets import load_dataset

    folder, name, commit = Path(request["folder"]), request["name"], request["commit"]
    say(f"downloading {name} at {commit}")
    with _hub_errors("dataset", name, commit):
        try:
            splits = load_dataset(name, request["subset"], revision=commit, cache_dir=request["scratch"])
        except ValueError as error:  # an unknown or missing subset; the message names those that there are
            raise UsageError(f"{name}: {' '.join(str(error).split())[:400]}", key="data.subset") from error
    train = "train" if "train" in splits else next((split for split in splits if split != request["split"]), request["split"])
    if train != "train" and len(splits) > 2:
        raise UsageError(f"{name} has no split 'train', only {', '.join(sorted(splits))}", key="data.name")
    chosen = {"train": train, **({"eval": request["split"]} if request["split"] in splits and request["split"] != train else {})}
    for ours, theirs in chosen.items():
        rows, columns = splits[theirs], request["columns"]
        for known, column in columns.items():
            if column not in rows.column_names:
                raise no_column(known, column, rows.column_names, Place(name, None, 0))
            if known != "messages" and "string" not in str(rows.features[column].dtype):
                raise UsageError(f"{name}: {column} is not text but {rows.features[column]}", key=f"data.{known}_column")
        rows = rows.select_columns(list(dict.fromkeys(columns.values())))
        renamed = {column: known for known, column in columns.items() if column != known}
        (rows.rename_columns(renamed) if renamed else rows).save_to_disk(str(folder / ours))
    return {"name": name, "commit": commit, "splits": sorted(chosen), "versions": {"datasets": version("datasets")}}


@contextmanager
def _hub_errors(kind: str, name: str, revision: str) -> Iterator[None]:
    """Say in one sentence what a user can do about the hub's many errors."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    key = "model" if kind == "model" else "data"
    try:
        yield
    except GatedRepoError as error:
        raise UsageError(
            f"{name} is gated: its terms must be accepted on the hub", key=f"{key}.name", hint="then set HF_TOKEN in the environment"
        ) from error
    except RepositoryNotFoundError as error:
        hint = "check the name; a private repository needs HF_TOKEN in the environment"
        raise UsageError(f"the hub has no {kind} {name}", key=f"{key}.name", hint=hint) from error
    except RevisionNotFoundError as error:
        raise UsageError(f"{name} has no revision {revision}", key=f"{key}.revision") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        http = any(base.__name__ == "HTTPError" for base in type(error).__mro__)  # of requests, httpx or httpx2, by the hub's version
        if isinstance(error, (OSError, HfHubHTTPError)) or http:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise ActionError(
                f"{name} could not be fetched from the hub: {first}",
                code="hub-unreachable",
                key=f"{key}.name",
                hint=f"stage where there is Internet, or give {key}.path, a folder that is already here",
            ) from error
        raise


if __name__ == "__main__":
    sys.exit(serve(fetch))

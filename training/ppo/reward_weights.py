"""Where the scorers' weights are, and which version of them a file holds."""

from __future__ import annotations

from pathlib import Path

from torch_utils.checkpoint import CheckpointError
from torch_utils.download_util import ASSETS, check_file_by_key
from torch_utils.errors import UserError

# A name that says nothing of what is in the file.
ANY_MODEL = "model.safetensors"


def find_weights(key: str, path: str | Path | None = None) -> Path:
    """The file of the asset `key`: `path`, the published file in the folder `path`, or the cached one, fetched first.

    A path that ends in the published file's name and is not there also means the cached file, unless that is a name
    that any model may have. Raises `UserError` naming the file, its source and the folder it belongs in.
    """
    asset = ASSETS[key]
    published = asset.files[0].name
    if path is None:
        return check_file_by_key(key)
    path = Path(path)
    if path.is_dir():
        path = path / published
    if path.is_file():
        return path
    if path.name == published != ANY_MODEL:
        return check_file_by_key(key)
    raise UserError(
        f"{path} is missing: download {published} from {asset.source()} into {path.parent}, or leave the path of the "
        f"weights out to have it fetched"
    )


def version_of(key: str, path: Path, sha256: str, version: str) -> str:
    """`version` for the published file of the asset `key`, else "custom".

    Raises `CheckpointError` for a file of the published name with other bytes, where the name means this file alone.
    """
    published = ASSETS[key].files[0]
    if sha256 == published.sha256:
        return version
    if path.name == published.name != ANY_MODEL:
        raise CheckpointError(
            f"{path} is damaged: SHA-256 {sha256[:8]}... is not the published one; download it again from "
            f"{ASSETS[key].source()}, or rename it if these are weights of your own"
        )
    return "custom"

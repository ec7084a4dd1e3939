"""The files that the project needs and does not ship: where they are looked for, where they come from, their hashes.

python -m torch_utils.download_util ms_coco prompts     fetches them, and prints where they are
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import click

from dnnlib.util import ANSWER_SECONDS, TIMEOUT, DownloadError, cache_dir, download, within
from torch_utils.checkpoint import atomic_write_text, sha256_file
from torch_utils.errors import user_errors
from torch_utils.options import CACHE_VARIABLE, cache_dir_option, command

PROJECT = Path(__file__).resolve().parents[1]
# owner/name of a model on the Hugging Face hub, with @ and a branch, tag or commit, or without.
HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?")


@dataclass(frozen=True)
class KnownFile:
    """One file of an asset, `name` relative to its folder; `size` in bytes and `sha256` are None where not known."""

    name: str
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Asset:
    """Something to download under one key: a single file, or a folder of files.

    key          What `check_file_by_key` is asked for.
    files        The files, all needed.
    project_dir  Folder inside the project in which a copy made by hand is found.
    cache_name   Folder inside `cache_dir()` into which downloads go.
    used_by      Who needs it, for the message when it is missing.
    repo         Hugging Face repository, with its full commit hash in `revision`; or None, and then
    base_url     address of the folder on the web.
    folder_env   Environment variable that replaces both folders.
    is_folder    Whether the answer is the folder rather than its only file.
    """

    key: str
    files: tuple[KnownFile, ...]
    project_dir: str
    cache_name: str
    used_by: str
    repo: str | None = None
    revision: str | None = None
    base_url: str | None = None
    folder_env: str | None = None
    is_folder: bool = False

    def folders(self) -> list[Path]:
        """Folders to look in, best first; the last one receives downloads."""
        override = os.environ.get(self.folder_env, "") if self.folder_env else ""
        if override:
            return [Path(override).expanduser()]
        return [PROJECT / self.project_dir, cache_dir() / self.cache_name]

    def source(self) -> str:
        """Where the files come from, for people."""
        return f"https://huggingface.co/{self.repo}/tree/{self.revision}" if self.repo else f"{self.base_url}"


# Sizes and hashes: the large files' entries on the hub (Git LFS). The small text files of the Stable Diffusion folder
# are fixed by the commit alone. The publisher of the captions gives neither size nor hash.
ASSETS: dict[str, Asset] = {
    asset.key: asset
    for asset in (
        Asset(
            key="ms_coco",
            files=(
                KnownFile("model_index.json"),
                KnownFile("scheduler/scheduler_config.json"),
                KnownFile("tokenizer/merges.txt"),
                KnownFile("tokenizer/special_tokens_map.json"),
                KnownFile("tokenizer/tokenizer_config.json"),
                KnownFile("tokenizer/vocab.json"),
                KnownFile("text_encoder/config.json"),
                KnownFile(
                    "text_encoder/model.safetensors",
                    492_265_874,
                    "d008943c017f0092921106440254dbbe00b6a285f7883ec8ba160c3faad88334",
                ),
                KnownFile("vae/config.json"),
                KnownFile(
                    "vae/diffusion_pytorch_model.safetensors",
                    334_643_276,
                    "a2b5134f4dbc140d9c11f11cba3233099e00af40f262f136c691fb7d38d2194c",
                ),
                KnownFile("unet/config.json"),
                KnownFile(
                    "unet/diffusion_pytorch_model.safetensors",
                    3_438_167_540,
                    "19da7aaa4b880e59d56843f1fcb4dd9b599c28a1d9d9af7c1143057c8ffae9f1",
                ),
            ),
            project_dir="weights/stable-diffusion-v1-5",
            cache_name="stable-diffusion-v1-5",
            used_by="the model ms_coco (Stable Diffusion v1.5)",
            repo="stable-diffusion-v1-5/stable-diffusion-v1-5",
            revision="451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
            is_folder=True,
        ),
        Asset(
            key="v1-5-pruned-emaonly",
            files=(
                KnownFile(
                    "v1-5-pruned-emaonly.safetensors",
                    4_265_146_304,
                    "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
                ),
            ),
            project_dir="weights",
            cache_name="stable-diffusion-v1-5-pruned",
            used_by="Stable Diffusion v1.5 from a single file",
            repo="stable-diffusion-v1-5/stable-diffusion-v1-5",
            revision="451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
        ),
        Asset(
            key="prompts",
            files=(KnownFile("MS-COCO_val2014_30k_captions.csv"),),
            project_dir="src/prompts",
            cache_name="prompts",
            used_by="PPO training on MS-COCO captions",
            base_url="https://github.com/boomb0om/text2image-benchmark/releases/download/v0.0.1",
        ),
        Asset(
            key="hps_v2.1",
            files=(
                KnownFile(
                    "HPS_v2.1_compressed.pt",
                    1_972_490_005,
                    "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837",
                ),
            ),
            project_dir="weights",
            cache_name="hps",
            used_by="the reward and the score HPSv2.1",
            repo="xswu/HPSv2",
            revision="697403c78157020a1ae59d23f111aa58ced35b0a",
            folder_env="HPS_ROOT",
        ),
        Asset(
            key="hps_v2.0",
            files=(KnownFile("HPS_v2_compressed.pt"),),
            project_dir="weights",
            cache_name="hps",
            used_by="the score HPSv2.0",
            repo="xswu/HPSv2",
            revision="697403c78157020a1ae59d23f111aa58ced35b0a",
            folder_env="HPS_ROOT",
        ),
        Asset(
            key="clip_l14",
            files=(
                KnownFile(
                    "model.safetensors",
                    1_710_540_580,
                    "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
                ),
            ),
            project_dir="weights/clip-vit-large-patch14",
            cache_name="clip-vit-large-patch14",
            used_by="the scores clip and aesthetic (OpenAI's CLIP ViT-L/14)",
            repo="openai/clip-vit-large-patch14",
            revision="32bd64288804d66eefd0ccbe215aa642df71cc41",
        ),
        Asset(
            key="aesthetic",
            files=(
                KnownFile(
                    "sac+logos+ava1-l14-linearMSE.pth",
                    3_714_759,
                    "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
                ),
            ),
            project_dir="weights",
            cache_name="aesthetic",
            used_by="the score aesthetic",
            base_url="https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main",
        ),
        Asset(
            key="pickscore_v1",
            files=(
                KnownFile(
                    "model.safetensors",
                    None,
                    "ef31ef6fc5ff4d9bb90dd232df4e145887ba62c5a03aa2841415f8c25f18d52e",
                ),
            ),
            project_dir="weights/PickScore_v1",
            cache_name="PickScore_v1",
            used_by="the score pick (PickScore v1)",
            repo="yuvalkirstain/PickScore_v1",
            revision="a4e4367c6dfa7288a00c550414478f865b875800",
        ),
        Asset(
            key="imagereward",
            files=(
                KnownFile(
                    "ImageReward.pt",
                    None,
                    "d71dc8d4912bc633c06ab8ef1ef6a81e8199d4369f14b47b29baf1d19de561f6",
                ),
            ),
            project_dir="weights",
            cache_name="imagereward",
            used_by="the score imagereward (ImageReward v1.0)",
            repo="zai-org/ImageReward",
            revision="5736be03b2652728fb87788c9797b0570450ab72",
        ),
        Asset(
            key="bert_vocabulary",
            files=(
                KnownFile(
                    "vocab.txt",
                    231_508,
                    "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
                ),
            ),
            project_dir="weights",
            cache_name="imagereward",
            used_by="the text of the score imagereward (BERT's vocabulary)",
            repo="google-bert/bert-base-uncased",
            revision="86b5e0934494bd15c9632b12f734a8a67f723594",
        ),
        Asset(
            key="mps",
            files=(KnownFile("MPS_overall_checkpoint.pth"),),
            project_dir="weights",
            cache_name="mps",
            used_by="the score mps (Multi-dimensional Preference Score)",
            base_url="https://github.com/Kwai-Kolors/MPS",
        ),
    )
}


def is_hub_id(text: str) -> bool:
    """Whether `text` can be the name of a model on the Hugging Face hub, as `check_file_by_key` takes it."""
    return HUB_ID.fullmatch(text) is not None


def check_file_by_key(key: str) -> Path:
    """Path of what stands under `key` in ASSETS: a file, or of "ms_coco" the folder.

    "ms_coco" is Stable Diffusion v1.5 in diffusers' layout, "v1-5-pruned-emaonly" the same in one file: both will do as
    a model's path. What is not on this machine is fetched.

    The key `owner/name` or `owner/name@revision` is a Stable Diffusion 1.x of the hub, a folder in diffusers' layout.
    Of the repository of "ms_coco" the pinned commit is taken, with sizes and hashes; of others `main`, and their files
    are checked by nothing but the hub's client. What is in the cache stays as it is.

    Raises `DownloadError`, one line, for an unknown key, for a local copy with another size or hash, and within some
    five seconds when the file is not here and cannot be fetched: it then names the file, its source, its hash, and the
    folder to put it into by hand. HF_HUB_OFFLINE=1 forbids every download. Under `torchrun` let one rank ask first.
    """
    asset = find_asset(key)
    found = locate(key)
    if found is not None:
        return found
    folder = asset.folders()[-1]
    if offline():
        raise DownloadError(f"{by_hand(key)} (HF_HUB_OFFLINE forbids downloads)")
    _make(folder)
    for file in asset.files:
        if (folder / file.name).is_file():
            continue
        try:
            _fetch(asset, file, folder)
        except DownloadError as error:
            raise DownloadError(f"{by_hand(key)} ({error})") from error
    return _verified(asset, folder)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        refusal = None if os.access(folder, os.W_OK) else os.strerror(errno.EACCES)
    except OSError as error:
        refusal = error.strerror
    if refusal is not None:
        raise DownloadError(
            f"{folder} cannot be written: {refusal}; name a cache folder with --cache-dir or in {CACHE_VARIABLE}"
        )


def locate(key: str) -> Path | None:
    """The same path when every file is already on this machine and intact, else None; never downloads.

    Looks into the project, into the cache, and, for hub files at the pinned commit, into the hub's own cache.
    Raises `DownloadError` for an unknown key and for a copy with another size or hash.
    """
    asset = find_asset(key)
    folder = stored_folder(asset)
    return None if folder is None else _verified(asset, folder)


def stored_folder(asset: Asset) -> Path | None:
    """The first folder with every file of `asset`; their contents are not looked at, and nothing is fetched."""
    places = [*asset.folders(), *_hub_snapshots(asset)]
    return next((place for place in places if all((place / file.name).is_file() for file in asset.files)), None)


def by_hand(key: str) -> str:
    """One line: which files are needed for `key`, from where, with which hashes, into which folder."""
    asset = find_asset(key)
    names = ", ".join(
        file.name + (f" (SHA-256 {file.sha256})" if file.sha256 else " (no hash published)" if not asset.repo else "")
        for file in asset.files
    )
    return f"{asset.used_by} needs {names}: get it from {asset.source()} and put it into {asset.folders()[-1]}"


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids downloads."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def stamped_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a large file (64 hex digits), computed once and remembered while path, size and mtime stay the same.

    Raises `OSError` when there is no such file. The note is kept under `verified/` in `cache_dir()`; where that cannot
    be written, the file is hashed each time.
    """
    digest = remembered_sha256(path)
    if digest is None:
        digest = sha256_file(path)
        note, stamp = _note(path)
        with contextlib.suppress(OSError):  # a read-only cache costs time, not correctness
            atomic_write_text(note, f"{digest} {stamp}")
    return digest


def remembered_sha256(path: str | os.PathLike[str]) -> str | None:
    """What `stamped_sha256` noted of the file as it is now, or None; nothing is computed or written.

    Raises `OSError` when there is no such file.
    """
    note, stamp = _note(path)
    with contextlib.suppress(OSError, UnicodeDecodeError):  # no note, or a damaged one
        digest, _, described = note.read_text(encoding="utf-8").partition(" ")
        if described == stamp:
            return digest
    return None


def _note(path: str | os.PathLike[str]) -> tuple[Path, str]:
    """Where the hash of a file is noted, and what the note says of the file's present state."""
    path = Path(path).resolve()
    status = path.stat()
    note = cache_dir() / "verified" / hashlib.sha256(str(path).encode()).hexdigest()[:32]
    return note, json.dumps([str(path), status.st_size, status.st_mtime_ns])


def find_asset(key: str) -> Asset:
    """The entry of ASSETS under `key`, or one made up for another model of the hub: its files without sizes and hashes.

    Raises `DownloadError` for an unknown key.
    """
    if key in ASSETS:
        return ASSETS[key]
    named = HUB_ID.fullmatch(key)
    if named is None:
        raise DownloadError(f"unknown file key {key!r}; known keys: {', '.join(ASSETS)}, or owner/name of a hub model")
    pinned = ASSETS["ms_coco"]
    if named["repo"] == pinned.repo and named["revision"] in (None, pinned.revision):
        return pinned
    revision = named["revision"] or "main"
    folder = f"{named['repo']}@{revision}".replace("/", "--")
    return replace(
        pinned,
        key=key,
        files=tuple(KnownFile(file.name) for file in pinned.files),
        project_dir=f"weights/{folder}",
        cache_name=f"hub/{folder}",
        used_by=f"the model {key} (no such folder here)",
        repo=named["repo"],
        revision=revision,
    )


def _verified(asset: Asset, folder: Path) -> Path:
    for file in asset.files:
        _verify(folder / file.name, file)
    return folder if asset.is_folder else folder / asset.files[0].name


def _verify(path: Path, file: KnownFile) -> None:
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        raise DownloadError(f"{path} has {size} bytes, expected {file.size}: delete it and fetch it again")
    if file.sha256 is not None and (digest := stamped_sha256(path)) != file.sha256:
        raise DownloadError(f"{path} has SHA-256 {digest}, expected {file.sha256}: delete it and fetch it again")
    if size == 0:
        raise DownloadError(f"{path} is empty: delete it and fetch it again")


def _hub_snapshots(asset: Asset) -> list[Path]:
    """The folder of the pinned commit in the hub's own cache, if any of it is there."""
    if asset.repo is None:
        return []
    from huggingface_hub import try_to_load_from_cache

    first = try_to_load_from_cache(asset.repo, asset.files[0].name, revision=asset.revision)
    # A third answer besides path and None says that the hub is known not to have the file.
    return [Path(first).parents[asset.files[0].name.count("/")]] if isinstance(first, str) else []


def _fetch(asset: Asset, file: KnownFile, folder: Path) -> None:
    if asset.repo is None:
        download(f"{asset.base_url}/{file.name}", folder / file.name, size=file.size, sha256=file.sha256)
        return
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    try:
        # Asked first because this call gives up at once, where the download itself retries for half a minute.
        url = hf_hub_url(asset.repo, file.name, revision=asset.revision)
        within(ANSWER_SECONDS, lambda: get_hf_file_metadata(url, timeout=TIMEOUT))
        # The hub's client shows a bar on a terminal and nothing elsewhere.
        size = f" ({file.size / 1e9:.2f} GB)" if file.size is not None else ""
        click.echo(f"fetching {file.name}{size} from {asset.repo}", err=True)
        hf_hub_download(asset.repo, file.name, revision=asset.revision, local_dir=folder)
    except Exception as error:
        # The HTTP library beneath huggingface_hub, and with it the exceptions, changes from version to version.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DownloadError(f"cannot fetch {file.name}: {reason}") from error


@command({"Machine": ("cache_dir",)})
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
@cache_dir_option
@user_errors
def main(keys: tuple[str, ...]) -> None:
    """Fetch what stands under each KEY, unless it is here, compare sizes and hashes, and print the paths.

    \b
    ms_coco        Stable Diffusion v1.5, a folder (4.3 GB)
    prompts        the MS-COCO captions that training uses
    owner/name     a Stable Diffusion 1.x of the Hugging Face hub
    Any other      an unknown key lists all

    Example (installed: epd-fetch):

    \b
    python -m torch_utils.download_util ms_coco prompts hps_v2.1
    """
    for key in keys:
        find_asset(key)
    for key in keys:
        click.echo(check_file_by_key(key))


if __name__ == "__main__":
    main()

"""Solver tables as folders, and as repositories of the Hugging Face hub: three files, none of which is ever run."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url

from dnnlib.util import ANSWER_SECONDS, TIMEOUT, DownloadError, within
from torch_utils.checkpoint import atomic_write_text, sha256_file
from torch_utils.download_util import ASSETS, HUB_ID, offline
from torch_utils.errors import UserError
from torch_utils.untrusted import MAX_CONFIG_BYTES, parse_json, read_bounded
from training.denoisers import BACKBONES
from training.generate import SamplingPlan
from training.model_card import model_card
from training.table import MAX_BYTES, SolverTable, TableError, load_table, save_table

TABLE_FILE, CONFIG_FILE, CARD_FILE = "epd_table.safetensors", "config.json", "README.md"
SIZES = {CONFIG_FILE: MAX_CONFIG_BYTES, TABLE_FILE: MAX_BYTES}  # what is read, and the most bytes of it
FORMAT = "epd-table-1"
TABLE_SUFFIXES = (".safetensors", ".json", ".pkl")
RUN_OPTIONS = "training_options.json"  # beside the table of an exported run
# Entry of a run's configuration -> what the card calls it. The rest is of the machine that it ran on, or private.
TRAINING = {"trainer.algorithm": "algorithm", "reward.type": "reward", "ppo.train_scale_dir": "train_scale_dir"}


@dataclass(frozen=True)
class EPDTable:
    """A solver table and where it comes from.

    base_model  hub id of the model that it was made for; None where that is not known, or not on the hub.
    training    how it was made, a flat JSON object for the card and for readers; empty where it is not known.
    """

    table: SolverTable
    base_model: str | None = None
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.base_model is not None and (
            not isinstance(self.base_model, str) or not HUB_ID.fullmatch(self.base_model)
        ):
            raise TableError(f"base_model is {ascii(self.base_model)[:80]}; it must be owner/name of the hub")
        plain = isinstance(self.training, dict) and all(
            isinstance(value, str | bool | int | float) and str(value).isprintable() and str(name).isprintable()
            for name, value in self.training.items()
        )
        if not plain:
            raise TableError("training must be a flat JSON object of texts and numbers")

    @classmethod
    def of(cls, source: Source) -> EPDTable:
        """`source` itself, a SolverTable with what its metadata tell, or what `from_pretrained` reads."""
        match source:
            case EPDTable():
                return source
            case SolverTable():
                return cls(source, _base_model(source))
        return cls.from_pretrained(source)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
    ) -> EPDTable:
        """Read a table.

        source    a folder that `save_pretrained` wrote; a run's folder with an export, or that `export` folder itself;
                  a table's file (.safetensors, .json, .pkl); or owner/name[@revision] of the hub. What exists on
                  this machine comes first.
        revision  of the hub: a branch, tag or commit; None is main.
        token     of the hub, for private repositories; None is the one that its client stores.

        Of the hub only `epd_table.safetensors` and `config.json` are fetched, of one commit, into the hub client's
        cache; HF_HUB_OFFLINE=1 takes them from there. Raises TableError or DownloadError, one line, for what cannot be
        had or does not fit together.
        """
        name, path = os.fspath(source), Path(source)
        shown, named = ascii(name)[1:-1], HUB_ID.fullmatch(name)
        if not path.exists() and named and path.suffix not in TABLE_SUFFIXES:
            if revision is not None and named["revision"] not in (None, revision):
                raise TableError(f"{shown} names another revision than {ascii(revision)[:80]}; name one of them")
            return _read_folder(_fetch(named["repo"], revision or named["revision"], token), shown)
        if revision is not None:
            raise TableError(f"{shown} is no repository of the hub, so it has no revision {ascii(revision)[:80]}")
        if not path.is_dir():
            if path.suffix not in TABLE_SUFFIXES and not path.exists():
                raise TableError(f"{shown} is no file or folder here, and not owner/name of the hub")
            table = load_table(path)
            return cls(table, _base_model(table))
        if (path / CONFIG_FILE).is_file() or (path / TABLE_FILE).is_file():
            return _read_folder({file: path / file for file in SIZES}, shown)
        for folder in (path, path / "export"):
            if (folder / RUN_OPTIONS).is_file():
                return _read_run(folder)
        raise TableError(f"{shown} holds neither {TABLE_FILE} nor a run's export; export the run, or name the table")

    def save_pretrained(self, folder: str | os.PathLike[str], repo_id: str | None = None) -> None:
        """Write the table (every bit), `config.json` and a model card to `folder`, which is made if need be.

        `repo_id` is what the card's example loads. Raises TableError where a file cannot be written.
        """
        folder = Path(folder)
        save_table(self.table, folder / TABLE_FILE)
        nfe = SamplingPlan.of_table(self.table, None, "float32").nfe()
        config = {
            "format": FORMAT,
            "base_model": self.base_model,
            "sha256": sha256_file(folder / TABLE_FILE),  # of the file
            "table_sha256": self.table.sha256(),  # as in manifests
            "nfe": nfe.nfe,
            "parallel_nfe": nfe.parallel_nfe,
            "forwards": nfe.forwards,
            "training": self.training,
            "table": self.table.metadata(),
        }
        try:
            atomic_write_text(folder / CONFIG_FILE, json.dumps(config, indent=2, allow_nan=False) + "\n")
            card = model_card(self.table, nfe, self.base_model, self.training, repo_id)
            atomic_write_text(folder / CARD_FILE, card)
        except OSError as error:
            raise TableError(f"{folder}: cannot be written: {error.strerror}") from error

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload solver table",
    ) -> str:
        """Upload what `save_pretrained` writes to `owner/name`, made if need be; returns the commit's hash.

        `private` counts for a new repository. Raises DownloadError, one line, if the hub refuses.
        """
        named = HUB_ID.fullmatch(repo_id)
        if named is None or named["revision"] is not None:
            raise TableError(f"{ascii(repo_id)[:80]} is not owner/name of the hub")
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, repo_id)
            api = HfApi(token=token)
            try:
                api.create_repo(repo_id, private=private, exist_ok=True)
                return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message).oid
            except Exception as error:  # the client's exceptions change from version to version
                raise DownloadError(f"{repo_id} cannot be uploaded: {_one_line(error)}") from error


Source: TypeAlias = EPDTable | SolverTable | str | os.PathLike[str]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _base_model(table: SolverTable) -> str | None:
    """Where the weights of the table's backbone are on the hub."""
    backbone = BACKBONES.get(table.dataset_name)
    return None if backbone is None or backbone.asset is None else ASSETS[backbone.asset].repo


def _fetch(repo: str, revision: str | None, token: str | bool | None) -> dict[str, Path]:
    """Name -> path of the two files of a hub repository, both of one commit."""
    found = {}
    for name, limit in SIZES.items():
        try:
            if not offline():
                # Asked first because this call gives up at once, where the download itself retries for half a minute.
                url = hf_hub_url(repo, name, revision=revision)
                answer = within(ANSWER_SECONDS, functools.partial(get_hf_file_metadata, url, token, TIMEOUT))
                if answer.size is not None and answer.size > limit:
                    raise UserError(f"it has {answer.size} bytes, far more than a table needs")
            found[name] = Path(hf_hub_download(repo, name, revision=revision, token=token, local_files_only=offline()))
        except Exception as error:  # the client's exceptions change from version to version
            hint = "HF_HUB_OFFLINE forbids downloads" if offline() else "HF_HUB_OFFLINE=1 takes what is in the cache"
            raise DownloadError(
                f"cannot fetch {name} of {repo} (no such folder here): {_one_line(error)} ({hint})"
            ) from error
        revision = found[name].parent.name  # the cache has a folder for each commit
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = parse_json(read_bounded(path, MAX_CONFIG_BYTES))
    except (OSError, ValueError) as error:
        raise TableError(f"{path} cannot be used: {_one_line(error)}") from error
    if not isinstance(values, dict):
        raise TableError(f"{path} cannot be used: it is no JSON object")
    return values


def _read_folder(files: dict[str, Path], name: str) -> EPDTable:
    """The table of `name`, whose `files` stand where SIZES names them."""
    config = _read_json(files[CONFIG_FILE])
    if config.get("format") != FORMAT:
        raise TableError(f'{name}: {CONFIG_FILE} is not of a solver table: it has no "format": "{FORMAT}"')
    table = load_table(files[TABLE_FILE])
    digest = sha256_file(files[TABLE_FILE])
    if config.get("sha256") != digest:
        raise TableError(f"{name}: {TABLE_FILE} has SHA-256 {digest}, {CONFIG_FILE} names another; fetch both again")
    try:
        return EPDTable(table, config.get("base_model"), config.get("training") or {})
    except TableError as error:
        raise TableError(f"{name}: {CONFIG_FILE}: {error}") from error


def _read_run(export: Path) -> EPDTable:
    """The table that `training.ppo.export_epd_predictor` wrote last, with what its options tell of the training."""
    options = _read_json(export / RUN_OPTIONS)
    snapshot, config = options.get("snapshot"), options.get("config")
    if not isinstance(snapshot, str) or not isinstance(config, dict):
        raise TableError(f"{export / RUN_OPTIONS} is not of an exported run; export it again")
    table = load_table(export / Path(snapshot).with_suffix(".safetensors").name)
    if options.get("table_sha256") != table.sha256():
        raise TableError(f"{export / RUN_OPTIONS} is of another table than {snapshot}; export the run again")
    training = {name: config[key] for key, name in TRAINING.items() if key in config}
    model = config.get("model.model_path")
    named = isinstance(model, str) and HUB_ID.fullmatch(model) and not Path(model).exists()
    return EPDTable(table, model if named else _base_model(table), {**training, "steps": options.get("step", 0)})

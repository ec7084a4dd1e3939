"""Every reader of files that others may have made: good files to start from, how to spoil them, how they are read.

A reader's `read` goes on to what the project does with the content at once, because a value that is accepted and cannot
be used is a fault too.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import io
import json
import pickle
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import hostile_mutations as mutations
import torch
from hostile_mutations import Mutation, Values
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Reader:
    """One reader.

    file       what it is given, below the case's folder.
    good       the contents to start from; called in an empty folder, in which it may put what stands beside the file.
    read       reads the file and uses what came of it.
    mutations  of the whole file's bytes, beside `mutate_bytes` and `random_bytes`, which all files get.
    words      of the format, for `mutate_bytes`.
    warm       modules that are imported beforehand, because it takes long.
    write      puts a content into the file.
    """

    file: str
    good: Callable[[Path], list[bytes]]
    read: Callable[[Path], object]
    mutations: tuple[Mutation, ...] = ()
    words: Sequence[bytes] = ()
    warm: Sequence[str] = ()
    write: Callable[[Path, bytes], object] = Path.write_bytes

    def spoil(self, data: bytes, rng: random.Random, values: Values) -> bytes:
        """A mutation of `data`, often by the parts of its format."""
        kind = rng.random()
        if kind < 0.04:
            return mutations.random_bytes(data, rng, values)
        if kind < 0.3 or not self.mutations:
            return mutations.mutate_bytes(data, rng, values, self.words)
        try:
            return rng.choice(self.mutations)(data, rng, values)
        except (UnicodeDecodeError, IndexError):  # a good file of a form that this mutation cannot take apart
            return mutations.mutate_bytes(data, rng, values, self.words)


# --- Solver tables. ---


def _tables() -> list:
    from training.ppo.cold_start import cold_start_table
    from training.table import SolverTable

    told = {"backend_config": {"a": [1, {"b": "ü"}]}, "sigma_min": 0.1, "sigma_max": 14.6, "afs": True}
    return [
        SolverTable([[0.25, 0.75]], [[0.5, 0.5]], dataset_name="emoji", **told),
        SolverTable([[0.2, 0.6]] * 3, [[0.3, 0.7]] * 3, [[0.9, 1.1]] * 3, [[1.0, 1.2]] * 3, scale_dir_range=0.5),
        cold_start_table(4, 1),
    ]


def _saved_tables(suffix: str, folder: Path) -> list[bytes]:
    from training.table import save_table

    contents = []
    for table in _tables():
        save_table(table, folder / f"good{suffix}")
        contents.append((folder / f"good{suffix}").read_bytes())
    (folder / f"good{suffix}").unlink()
    return contents


def _read_table(path: Path) -> None:
    from training.table import TableError, load_table, save_table

    table = load_table(path)
    table.sha256()
    for suffix in (".json", ".safetensors", ".pkl"):
        with contextlib.suppress(TableError):
            save_table(table, path.parent / f"again{suffix}")
            (path.parent / f"again{suffix}").unlink()


# --- Checkpoints and scorers' weights. ---


def _saved(content: object, **options: object) -> bytes:
    torch.save(content, buffer := io.BytesIO(), **options)
    return buffer.getvalue()


@functools.cache
def _training_state() -> dict:
    parameter = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    return {
        "step": 12,
        "policy": {"w": torch.arange(5, dtype=torch.float64), "h": torch.ones(2).bfloat16()},
        "optimizer": optimizer.state_dict(),
        "guard": {"best": 0.5, "list": [1, 2.5, None, True, "é"]},
        "start_table_sha256": "ab" * 32,
    }


def _checkpoints(folder: Path) -> list[bytes]:
    state = _training_state()
    return [_saved(state), _saved({"step": 1}), _saved(state, _use_new_zipfile_serialization=False)]


def _weights() -> dict[str, torch.Tensor]:
    base = torch.arange(12.0).view(3, 4)
    return {
        "a.weight": base,
        "a.bias": base[1],
        "t": base.t(),
        "b": torch.ones(2).half(),
        "n": torch.tensor(3),
        "u": torch.ones(3).byte(),
    }


def _weight_files(folder: Path) -> list[bytes]:
    parameters = {"a": torch.nn.Parameter(torch.ones(2, 2))}
    return [_saved(_weights()), _saved(parameters), _saved(_weights(), _use_new_zipfile_serialization=False)]


def _write_with_record(path: Path, data: bytes) -> None:
    """A record that fits: the hash keeps damage out, not somebody who makes both files."""
    path.write_bytes(data)
    path.with_name(path.name + ".sha256").write_text(f"{hashlib.sha256(data).hexdigest()}  {path.name}\n")


def _use_tensors(content: object) -> None:
    """Touch every tensor, as a model that takes its weights would."""
    todo = [content]
    while todo:
        value = todo.pop()
        if isinstance(value, torch.Tensor):
            torch.isfinite(value).all()
            value.to(torch.float32)
        elif isinstance(value, dict):
            todo += value.values()


def _read_checkpoint(path: Path) -> None:
    from torch_utils.checkpoint import load_checkpoint

    _use_tensors(load_checkpoint(path))


def _read_record(path: Path) -> None:
    from torch_utils.checkpoint import load_checkpoint

    load_checkpoint(path.with_suffix(""))


def _records(folder: Path) -> list[bytes]:
    _write_with_record(folder / "policy.pt", _saved({"step": 1}))
    return [(folder / "policy.pt.sha256").read_bytes()]


def _read_tensors(path: Path) -> None:
    from torch_utils.checkpoint import load_tensors

    _use_tensors(load_tensors(path, "a checkpoint"))


def _read_weights(path: Path) -> None:
    """As a scorer does: into a network of a known shape, by `load_strict`."""
    from torch_utils.errors import UserError
    from training.ppo.reward_base import load_strict, read_weights

    state = read_weights(path, "weights")
    model = torch.nn.Module()
    for name, value in _weights().items():
        model.register_buffer(name.replace(".", "_"), torch.zeros_like(value))
    with contextlib.suppress(UserError):
        load_strict(model, {name.replace(".", "_"): value for name, value in state.items()}, path)


def _safetensors_weights(folder: Path) -> list[bytes]:
    from safetensors.torch import save

    tensors = {name: value.contiguous().clone() for name, value in _weights().items()}
    return [save(tensors, {"format": "pt"}), save({"a": torch.ones(3)}), save({"e": torch.zeros(0, 4)})]


# --- MPS: a pickled module. ---


def _mps_files(folder: Path) -> list[bytes]:
    layer = torch.nn.Sequential(
        torch.nn.Linear(2, 3), torch.nn.LayerNorm(3), torch.nn.Sequential(torch.nn.Linear(3, 1))
    )
    layer.register_buffer("kept", torch.arange(4))
    layer.register_buffer("passing", torch.ones(2), persistent=False)
    state = {f"mps.{name}": value for name, value in layer.half().state_dict().items()}
    return [_saved(layer), _saved(state), _saved(layer.state_dict(), _use_new_zipfile_serialization=False)]


def _read_mps(path: Path) -> None:
    from MPS.trainer.models.checkpoint import read_state_dict
    from torch_utils.errors import UserError
    from training.ppo.reward_base import load_strict

    state = read_state_dict(path)
    model = torch.nn.Module()
    for name, value in state.items():
        if value.dim() < 8 and value.numel() < 1000:
            model.register_buffer(name.replace(".", "_"), torch.zeros(value.shape))
    with contextlib.suppress(UserError, KeyError):  # a buffer may not have the name of a method
        load_strict(model, {name.replace(".", "_"): value for name, value in state.items()}, path)


# --- Text: prompts, configurations, a vocabulary. ---

PROMPTS = ["a 3d emoji of a cat", 'a "quoted", one', "日本の絵", "x" * 300]
PROMPT_WORDS = (b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\x1c", b" ", b"\r\n", b"\r", *b'text caption " "" , \0'.split())


def _prompt_texts(folder: Path) -> list[bytes]:
    text = "\n".join(PROMPTS)
    return [text.encode(), ("\ufeff" + text.replace("\n", "\r\n") + "\r\n").encode(), b"one\n"]


def _prompt_tables(folder: Path) -> list[bytes]:
    contents = []
    for header in (["id", "text"], ["Caption"]):
        writer = csv.writer(buffer := io.StringIO(newline=""))
        rows = [[index, prompt][-len(header) :] for index, prompt in enumerate(PROMPTS)]
        writer.writerows([header, *rows])
        contents.append(buffer.getvalue().encode())
    return contents


def _read_prompts(path: Path) -> None:
    from training.prompts import PromptError, load_prompts, prompts_for_seeds

    prompts = load_prompts(path)
    assert all(prompt.strip() for prompt in prompts)
    with contextlib.suppress(PromptError):
        prompts_for_seeds(prompts, [0, 1])


def _configurations(folder: Path) -> list[bytes]:
    from training.ppo.config import Config, to_yaml

    files = sorted((ROOT / "training" / "ppo" / "cfgs").glob("*.yaml"))
    mixed = """
model: {num_steps: 6, num_points: 2, compile: off}
reward: {type: mixed, components: [{type: hps, weight: 0.5, transform: /26}, {type: pick, transform: published}]}
evaluation: {metrics: [clip, "package.module:function"], num_prompts: 2}
run: {run_name: "${model.dataset_name}", seed: 3}
"""
    whole = Config()
    whole.model.num_steps, whole.model.num_points = 6, 2
    return [*(file.read_bytes() for file in files), mixed.encode(), to_yaml(whole).encode()]


def _use_configuration(config: object) -> None:
    from training.ppo.config import ConfigError, check_names, check_world_size, flatten, to_yaml, trained_rewards

    flatten(config)
    text = to_yaml(config)
    text.encode("utf-8")
    trained_rewards(config.reward)
    with contextlib.suppress(ConfigError):
        check_world_size(config, 2)
        check_names(config)
    for name in (config.run.run_name, config.run.output_root, config.data.prompt_csv, config.model.model_path):
        Path(name or "x").is_file()
    assert "/" not in config.run.run_name


def _read_configuration(path: Path) -> None:
    from training.ppo.config import load_config

    _use_configuration(load_config(path))


def _overrides(folder: Path) -> list[bytes]:
    (folder / "base.yaml").write_text("model: {num_steps: 6, num_points: 2}\n")
    items = ["ppo.steps=7", "run.run_name=a", "evaluation.metrics=[a, b]", "run.run_name=${model.dataset_name}"]
    items += ["ppo.learning_rate=1e-4", "model.sigma_min=null", "ppo.shared_noise=false", "model.compile=off"]
    return [item.encode() for item in items]


def _read_override(path: Path) -> None:
    """The file holds what stands behind `--override`; a command line has no half characters and no zero bytes."""
    from training.ppo.config import load_config

    item = path.read_bytes().replace(b"\0", b"").decode("utf-8", "surrogateescape")
    _use_configuration(load_config(path.with_name("base.yaml"), [item]))


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "##s", "of", "é", "##é", ",", "日"]


def _vocabularies(folder: Path) -> list[bytes]:
    return [("\n".join(WORDS) + "\n").encode(), "\n".join(reversed(WORDS)).encode()]


def _read_vocabulary(path: Path) -> None:
    from training.ppo.reward_models.imagereward import BertTokenizer

    tokenizer = BertTokenizer(path, len(WORDS), 8)
    ids, _ = tokenizer([*PROMPTS[:3], "", "cats [DEC] [PAD] [CLS] é"])
    assert ids.shape == (5, 8)
    tokenizer.count_truncated(PROMPTS)


# --- Pictures and the folders that hold them. ---


def _pictures(folder: Path) -> list[bytes]:
    """PNG of every kind, and the other formats that are read, which a file named .png may hold."""
    base = Image.frombytes("RGB", (8, 6), bytes(range(144)))
    contents = []
    for mode in ("RGB", "RGBA", "L", "LA", "P", "1"):
        base.convert("L" if mode in ("1", "LA") else "RGB").convert(mode).save(buffer := io.BytesIO(), "PNG")
        contents.append(buffer.getvalue())
    base.save(buffer := io.BytesIO(), "PNG", save_all=True, append_images=[base.transpose(0)], duration=5)
    contents.append(buffer.getvalue())
    for kind in ("JPEG", "GIF", "BMP", "WEBP"):
        base.save(buffer := io.BytesIO(), kind)
        contents.append(buffer.getvalue())
    return contents


def _read_picture(path: Path) -> None:
    from training.images import load_image

    image = load_image(path)
    assert image.dim() == 3 and image.shape[0] == 3 and image.numel() > 0
    assert float(image.min()) >= 0 and float(image.max()) <= 1


@functools.cache
def _rows() -> list[dict]:
    sampling = {"solver": "ddim", "options": {"max_order": 2}, "num_steps": 6, "table_sha256": None, "nfe": 10}
    sampling |= {"schedule_type": "logsnr", "guidance_rate": 7.5, "parallel_nfe": 5, "forwards": 20}
    return [
        {"file": f"000000/{seed:06d}.png", "seed": seed, "prompt": prompt, **sampling, "sha256": "0" * 64}
        for seed, prompt in enumerate(PROMPTS[:3])
    ]


def _lines(folder: Path) -> list[bytes]:
    """A manifest beside its pictures; a picture and a file lie outside of the folder."""
    images = folder / "000000"
    images.mkdir(exist_ok=True)
    for seed in range(3):
        Image.new("RGB", (4, 4), (seed, 9, 9)).save(images / f"{seed:06d}.png")
    text = "".join(json.dumps(row) + "\n" for row in _rows())
    return [text.encode(), (json.dumps(_rows()[0]) + "\n").encode()]


def _read_lines_to_score(path: Path) -> None:
    """As the scorers do: what would be scored lies in the folder, and what is said of it can be written down."""
    from training.images import load_image
    from training.ppo.scoring import collect_images

    images = collect_images(path.parent)
    for entry in images.entries:
        assert entry.path.resolve().is_relative_to(path.parent.resolve())
        load_image(entry.path)
    rows = [{"file": entry.file, "seed": entry.seed, "prompt": entry.prompt} for entry in images.entries]
    record = {**images.sampling, "scores": rows}
    json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8")


def _read_lines_to_continue(path: Path) -> None:
    """As sampling does that goes on in a folder."""
    from torch_utils.errors import UserError
    from training.manifest import Manifest

    manifest = Manifest(
        path.parent, {name: value for name, value in _rows()[0].items() if name in ("solver", "options")}
    )
    try:
        assert set(manifest.missing(dict(enumerate(PROMPTS)))) <= {0, 1, 2, 3}
    finally:
        for anew in ([0, 1], []):
            with contextlib.suppress(UserError):
                manifest.begin(anew)
                manifest.join([])


def _score_records(folder: Path) -> list[bytes]:
    scores = [{"file": row["file"], "seed": row["seed"], "prompt": row["prompt"], "score": 0.5} for row in _rows()]
    how = {"weights_sha256": "ab" * 32, "preprocessing": "p", "dtype": "float32", "libraries": {"torch": "2"}}
    sampling = {name: _rows()[0][name] for name in ("solver", "options", "nfe", "parallel_nfe", "forwards")}
    head = {"metric": "hps_v2.1", "version": "v2.1", "images_dir": folder.as_posix(), **sampling}
    record = {**head, "count": 3, "mean": 0.5, "ci95": None, **how, "unreadable": [], "scores": scores}
    (folder / "other.json").write_text(json.dumps({**record, "images_dir": "samples/other"}))
    _lines(folder)
    return [json.dumps(record).encode(), json.dumps({**record, "scores": scores[:1]}, indent=1).encode()]


def _read_scores(path: Path) -> None:
    """As the comparing commands do, with a good record beside it, up to their tables."""
    from torch_utils.errors import UserError
    from training.ppo.comparison import check_comparison_outputs, compare, load_scores, to_csv, to_markdown
    from training.ppo.scoring import check_output

    with contextlib.suppress(UserError):
        check_comparison_outputs(path, path)
    with contextlib.suppress(UserError):
        check_output(path, "hps_v2.1", path.parent)
    record = load_scores(path)
    other = load_scores(path.with_name("other.json"))
    for records in ([record], [record, other]):
        with contextlib.suppress(UserError):
            label = Path(other["images_dir"]).name if len(records) > 1 else None
            comparison = compare(records, label, force=True, allow_missing=True)
            (to_markdown(comparison) + to_csv(comparison)).encode("utf-8")
            json.dumps(comparison, ensure_ascii=False, allow_nan=False).encode("utf-8")


# --- Diffusion models. ---

SMALL = {
    "unet": {
        "block_out_channels": [8, 8, 8, 8],
        "cross_attention_dim": 8,
        "attention_head_dim": 1,
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "sample_size": 8,
    },
    "vae": {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 64},
    "text_encoder": {
        **{"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
        **{"vocab_size": 2048, "max_position_embeddings": 24, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
    },
}


def _small_model(folder: Path) -> Path:
    """A folder in diffusers' layout: Stable Diffusion with few channels, and the embedded model's tokenizer."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from training.denoisers import BACKBONES, EMBEDDED

    model = folder / "model"
    source = BACKBONES["ms_coco"].configs
    torch.manual_seed(0)
    for part, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        values = json.loads((source / part / "config.json").read_text())
        kind.from_config(values | SMALL[part]).half().save_pretrained(model / part)
    values = json.loads((source / "text_encoder" / "config.json").read_text())
    CLIPTextModel(CLIPTextConfig(**(values | SMALL["text_encoder"]))).half().save_pretrained(model / "text_encoder")
    for part in ("scheduler", "tokenizer"):
        shutil.copytree(EMBEDDED / part, model / part, dirs_exist_ok=True)
    return model


def _single_state(folder: Path) -> dict[str, torch.Tensor]:
    from compvis import compvis_state

    from training.denoisers.stable_diffusion import load_folder

    model = _small_model(folder)
    parts = compvis_state(*load_folder(model, torch.float32))
    return {name: value.contiguous().clone() for name, value in parts.items()}


def _single_safetensors(folder: Path) -> list[bytes]:
    from safetensors.torch import save

    return [save(_single_state(folder))]


def _single_checkpoints(folder: Path) -> list[bytes]:
    state = _single_state(folder)
    return [_saved({"state_dict": state, "global_step": 1}), _saved(state)]


def _read_single(path: Path) -> None:
    from training.denoisers.single_file import check_single_file, load_single_file

    check_single_file(path)
    networks = load_single_file(path, path.parent / "model", torch.float32)
    for network in networks:
        assert all(parameter.device.type == "cpu" for parameter in network.parameters())


MODEL_PARTS = (
    *("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"),
    *("tokenizer/tokenizer_config.json", "tokenizer/tokenizer.json", "text_encoder/model.safetensors"),
    *("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"),
)
SEPARATOR = b"\n@@@\n"


def _model_parts(folder: Path) -> list[bytes]:
    """The file's name and its content: the file is put back into the folder before it is read."""
    model = _small_model(folder)
    return [name.encode() + SEPARATOR + (model / name).read_bytes() for name in MODEL_PARTS]


def _mutate_part(data: bytes, rng: random.Random, values: Values) -> bytes:
    name, _, content = data.partition(SEPARATOR)
    change = mutations.mutate_safetensors if name.endswith(b"safetensors") else mutations.mutate_json
    if rng.random() < 0.2:
        change = mutations.mutate_bytes
    return name + SEPARATOR + change(content, rng, values)


@contextlib.contextmanager
def _changed_part(path: Path, names: Sequence[str]) -> Iterator[Path | None]:
    """The folder "model" with the part that `path` holds, for as long as the block runs; None for another name."""
    name, _, content = path.read_bytes().partition(SEPARATOR)
    if name.decode("latin-1") not in names:
        yield None
        return
    part = path.parent / "model" / name.decode()
    before = part.read_bytes()
    part.write_bytes(content)
    try:
        yield path.parent / "model"
    finally:
        part.write_bytes(before)


def _read_model(path: Path) -> None:
    """A folder with one part of it changed."""
    from training.denoisers import note_resolution
    from training.denoisers.stable_diffusion import StableDiffusion, check_source

    with _changed_part(path, MODEL_PARTS) as model:
        if model is not None:
            check_source(model)
            note_resolution("emoji", model, 64)
            StableDiffusion(model, model, "emoji", 7.5, torch.device("cpu"))


SCORER_PARTS = (
    *("config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json"),
    "model.safetensors",
)


def _scorer_parts(folder: Path) -> list[bytes]:
    from tiny_rewards import write_emoji_folder

    write_emoji_folder(folder / "model")
    return [name.encode() + SEPARATOR + (folder / "model" / name).read_bytes() for name in SCORER_PARTS]


def _read_scorer(path: Path) -> None:
    """A reward's folder with one part of it changed."""
    from training.ppo.reward_models.emoji import RewardEmoji

    with _changed_part(path, SCORER_PARTS) as folder:
        if folder is not None:
            RewardEmoji("emoji_reward", folder)


def _table_pickle(data: bytes, rng: random.Random, values: Values) -> bytes:
    """An attribute of the snapshot replaced by a value that pickles."""
    from training.networks import EPD_predictor
    from training.table import SolverTable

    predictor = EPD_predictor.from_table(SolverTable([[0.2, 0.6]] * 2, [[0.3, 0.7]] * 2))
    for value in values[: rng.choice([1, 1, 3])]:
        names = [name for name in vars(predictor) if not name.startswith("_")]
        vars(predictor)[rng.choice([*names, "new"])] = value
    return pickle.dumps({"model": predictor}, rng.choice([2, 4, 4, 5]))


DIFFUSERS = ("diffusers", "diffusers.loaders.single_file_utils", "transformers", "open_clip")
JSON, LINES, YAML = (mutations.mutate_json,), (mutations.mutate_json_lines,), (mutations.mutate_yaml,)
TORCH, SAFETENSORS = (mutations.mutate_torch,), (mutations.mutate_safetensors,)

READERS = {
    "table .pkl": Reader(
        "table.pkl",
        functools.partial(_saved_tables, ".pkl"),
        _read_table,
        (mutations.mutate_pickle, _table_pickle),
        mutations.OPCODES,
    ),
    "table .json": Reader("table.json", functools.partial(_saved_tables, ".json"), _read_table, JSON),
    "table .safetensors": Reader(
        "table.safetensors", functools.partial(_saved_tables, ".safetensors"), _read_table, SAFETENSORS
    ),
    "checkpoint": Reader(
        "policy.pt", _checkpoints, _read_checkpoint, TORCH, mutations.OPCODES, write=_write_with_record
    ),
    "checkpoint's record": Reader("policy.pt.sha256", _records, _read_record),
    "tensors .ckpt": Reader("model.ckpt", _checkpoints, _read_tensors, TORCH, mutations.OPCODES),
    "weights .pt": Reader("weights.pt", _weight_files, _read_weights, TORCH, mutations.OPCODES),
    "weights .safetensors": Reader("weights.safetensors", _safetensors_weights, _read_weights, SAFETENSORS),
    "MPS": Reader("mps.pth", _mps_files, _read_mps, TORCH, mutations.OPCODES),
    "prompts .txt": Reader("prompts.txt", _prompt_texts, _read_prompts, words=PROMPT_WORDS),
    "prompts .csv": Reader("prompts.csv", _prompt_tables, _read_prompts, words=PROMPT_WORDS),
    "configuration": Reader("config.yaml", _configurations, _read_configuration, YAML, mutations.YAML_WORDS),
    "override": Reader("override", _overrides, _read_override, words=mutations.YAML_WORDS),
    "image": Reader("image.png", _pictures, _read_picture, (mutations.mutate_png,)),
    "manifest to score": Reader("manifest.jsonl", _lines, _read_lines_to_score, LINES),
    "manifest to continue": Reader("manifest.jsonl", _lines, _read_lines_to_continue, LINES),
    "score record": Reader("scores.json", _score_records, _read_scores, JSON),
    "single file .safetensors": Reader(
        "model.safetensors", _single_safetensors, _read_single, SAFETENSORS, warm=DIFFUSERS
    ),
    "single file .ckpt": Reader(
        "model.ckpt", _single_checkpoints, _read_single, TORCH, mutations.OPCODES, warm=DIFFUSERS
    ),
    "model folder": Reader("part", _model_parts, _read_model, (_mutate_part,), warm=DIFFUSERS),
    "scorer folder": Reader("part", _scorer_parts, _read_scorer, (_mutate_part,), warm=DIFFUSERS),
    "vocabulary": Reader("vocab.txt", _vocabularies, _read_vocabulary, words=[word.encode() for word in WORDS]),
}

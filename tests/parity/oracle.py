"""Scores by the metrics' original packages, to compare ours with. Runs in the environment that setup.sh makes.

    python oracle.py --metric hps --weights FILE --images DIR --prompts FILE --output JSON

Pair n is the n-th image of the folder, in sorted order, and the n-th prompt of a JSON list. All is float32 on the CPU,
one pair at a time. Nothing is downloaded, and of the weights only tensors are read. `--pixels DIR` takes the pictures
as the package resizes and cuts them, of those packages that do it to 8-bit pictures, under the images' names.

Each image is scored twice: as its file is ("score"), and after Pillow's convert("RGB") ("score_rgb"), which is what our
scorers see. They differ where a package resizes before it converts. A score is null, with the reason under "error",
where the original code fails.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the packages would take a GPU, and half precision with it

import torch
from PIL import Image

# The packages unpickle checkpoints without protection.
torch.load = functools.partial(torch.load, weights_only=True)

PACKAGES = ("hpsv2", "image-reward", "openai-clip", "torch", "torchvision", "transformers", "timm", "numpy", "pillow")
# Of ImageReward's repository on the hub; BLIP's configuration of BERT.
MED_CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "add_type_embeddings": False,
    "vocab_size": 30524,
    "encoder_width": 768,
    "add_cross_attention": True,
}

Score = Callable[[str, str], float]  # of a file and a prompt


@dataclass(frozen=True)
class Original:
    """One package's own code, with the given weights."""

    score: Score
    loading: dict  # how the weights were loaded, for the report
    resize: Callable[[Image.Image], Image.Image] | None  # to the 224 x 224 pixels that are scored; None: of tensors


def hps_scorer(arguments: argparse.Namespace) -> Original:
    """hpsv2.img_score.score itself, which without CUDA computes in float32 (its autocast is CUDA's).

    Replaced is one argument of its construction: the tag of LAION's weights, which it would download and then overwrite
    with the given ones. It loads the checkpoint anew for each call, strictly.
    """
    import torchvision
    from hpsv2 import img_score
    from hpsv2.src import open_clip

    architecture = "ViT-H-14"
    if arguments.model_config:
        open_clip.add_model_config(Path(arguments.model_config))
        architecture = Path(arguments.model_config).stem
    create = img_score.create_model_and_transforms
    img_score.create_model_and_transforms = lambda name, pretrained, **rest: create(architecture, None, **rest)
    img_score.initialize_model()

    step = torch.zeros(1, 3, 8, 1)
    step[:, :, 3] = 1
    bicubic = torchvision.transforms.InterpolationMode.BICUBIC
    plain = torchvision.transforms.functional.resize(step, [2, 1], bicubic, antialias=False)
    antialias = not torch.equal(torchvision.transforms.functional.resize(step, [2, 1], bicubic), plain)

    def score(path: str, prompt: str) -> float:
        return float(img_score.score(path, prompt, cp=arguments.weights)[0])

    return Original(score, {"antialias": antialias, "strict": True}, None)


def imagereward_scorer(arguments: argparse.Namespace) -> Original:
    """ImageReward.score of the package's class, its weights loaded as the package's `load` does (not strictly).

    The package asks for the tokenizer "bert-base-uncased", which may be a folder: one with the given vocabulary.
    """
    from ImageReward.ImageReward import ImageReward

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "bert-base-uncased"
        tokenizer.mkdir()
        (tokenizer / "vocab.txt").write_bytes(Path(arguments.bert_vocabulary).read_bytes())
        (tokenizer / "tokenizer_config.json").write_text('{"do_lower_case": true, "model_max_length": 512}')
        config = Path(folder) / "med_config.json"
        config.write_text(json.dumps(MED_CONFIG))
        start = Path.cwd()
        os.chdir(folder)
        try:
            model = ImageReward(med_config=str(config), device="cpu")
        finally:
            os.chdir(start)
    keys = model.load_state_dict(torch.load(arguments.weights, map_location="cpu", weights_only=True), strict=False)
    model.eval()
    report = {
        "missing": keys.missing_keys,
        "unexpected": keys.unexpected_keys,
        "tokens": len(model.blip.tokenizer),
        "vision_epsilon": model.blip.visual_encoder.norm.eps,
    }

    def score(path: str, prompt: str) -> float:
        with torch.no_grad():
            return model.score(prompt, path)

    return Original(score, report, resizing(model.preprocess))


def resizing(preprocess: Callable) -> Callable[[Image.Image], Image.Image]:
    """The steps of OpenAI's preprocessing, or a copy of it, that work on pictures: resizing and the centre crop."""
    from torchvision.transforms import CenterCrop, Compose, Resize

    return Compose([step for step in preprocess.transforms if isinstance(step, Resize | CenterCrop)])


def read_openai(path: str) -> dict[str, torch.Tensor]:
    """OpenAI's state dict, from their TorchScript archive or from a plain dict."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        return torch.jit.load(path, map_location="cpu").state_dict()


def serve_clip(path: str) -> None:
    """Make clip.load return the given weights.

    It downloads by the model's name, checks for the published hash, and cannot read a plain state dict from the file
    that it has just tried to read as TorchScript. What it does then is done here: build_model, which rounds matrices
    to half precision, as the published ones are, and float(), as it does on CPUs.
    """
    import clip

    def load(name: str, device: str, jit: bool, download_root: str | None) -> tuple:
        model = clip.model.build_model(read_openai(path)).float()
        return model, clip.clip._transform(model.visual.input_resolution)

    clip.load = load


def clip_scorer(arguments: argparse.Namespace) -> Original:
    """CLIPScore of the package image-reward, which the EPD paper's numbers come from: OpenAI's CLIP and a cosine."""
    serve_clip(arguments.weights)
    from ImageReward.models.CLIPScore import CLIPScore

    model = CLIPScore(download_root=None, device="cpu").eval()

    def score(path: str, prompt: str) -> float:
        with torch.no_grad():
            return model.score(prompt, path)

    return Original(score, {"strict": True}, resizing(model.preprocess))


def aesthetic_scorer(arguments: argparse.Namespace) -> Original:
    """AestheticScore of the package image-reward: OpenAI's CLIP, and LAION's linear layers, strictly loaded."""
    serve_clip(arguments.backbone)
    from ImageReward.models.AestheticScore import AestheticScore

    model = AestheticScore(download_root=None, device="cpu")
    model.mlp.load_state_dict(torch.load(arguments.weights, map_location="cpu", weights_only=True))
    model.eval()

    def score(path: str, prompt: str) -> float:
        with torch.no_grad():
            return model.score(prompt, path)

    return Original(score, {"strict": True}, resizing(model.preprocess))


def pick_scorer(arguments: argparse.Namespace) -> Original:
    """PickScore as its authors' README computes it, by transformers' CLIPModel and CLIPProcessor.

    The processor's files are made from CLIP's vocabulary, which is the same in the repositories on the hub.
    """
    import gzip

    import clip
    from safetensors.torch import load_file
    from tokenizers import AddedToken
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

    model = CLIPModel(CLIPConfig.from_json_file(arguments.model_config))
    keys = model.load_state_dict(load_file(arguments.weights), strict=False)
    model.eval()
    lines = gzip.decompress(Path(clip.simple_tokenizer.default_bpe()).read_bytes()).decode().split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    letters = list(clip.simple_tokenizer.bytes_to_unicode().values())
    words = letters + [letter + "</w>" for letter in letters] + ["".join(merge.split()) for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merge_file = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocabulary.write_text(json.dumps({word: index for index, word in enumerate(words)}), encoding="utf-8")
        merge_file.write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
        tokenizer = CLIPTokenizerFast(str(vocabulary), str(merge_file), model_max_length=77)
    # The repositories' tokenizer.json reads these out of prompts; without that file this has to be said.
    tokenizer.add_tokens([AddedToken("<|startoftext|>"), AddedToken("<|endoftext|>", normalized=False)], True)
    processor = CLIPProcessor(CLIPImageProcessor(), tokenizer)

    def score(path: str, prompt: str) -> float:
        options = {"padding": True, "truncation": True, "max_length": 77, "return_tensors": "pt"}
        images = processor(images=[Image.open(path)], **options)
        texts = processor(text=[prompt], **options)
        with torch.no_grad():
            image = model.get_image_features(**images)
            image = image / torch.norm(image, dim=-1, keepdim=True)
            text = model.get_text_features(**texts)
            text = text / torch.norm(text, dim=-1, keepdim=True)
            return float((model.logit_scale.exp() * (text @ image.T)[0])[0])

    def resize(picture: Image.Image) -> Image.Image:
        levels = processor.image_processor(picture, do_rescale=False, do_normalize=False)["pixel_values"][0]
        return Image.fromarray(levels.transpose(1, 2, 0))

    return Original(score, {"missing": keys.missing_keys, "unexpected": keys.unexpected_keys}, resize)


SCORERS = {
    "hps": hps_scorer,
    "imagereward": imagereward_scorer,
    "clip": clip_scorer,
    "aesthetic": aesthetic_scorer,
    "pick": pick_scorer,
}


def attempt(score: Score, path: Path, prompt: str) -> tuple[float | None, str | None]:
    """The score, or what went wrong."""
    try:
        return score(str(path), prompt), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--metric", choices=SCORERS, required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--backbone", help="OpenAI's CLIP, for aesthetic")
    parser.add_argument("--bert-vocabulary", help="vocab.txt of bert-base-uncased, for imagereward")
    parser.add_argument("--model-config", help="JSON: open_clip's for hps (default: ViT-H-14), transformers' for pick")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pixels", type=Path, help="existing folder for the resized pictures")
    arguments = parser.parse_args()
    needed = {"imagereward": "bert_vocabulary", "aesthetic": "backbone", "pick": "model_config"}.get(arguments.metric)
    if needed and not vars(arguments)[needed]:
        parser.error(f"--metric {arguments.metric} needs --{needed.replace('_', '-')}")

    images = sorted(path for path in arguments.images.iterdir() if path.is_file())
    prompts = json.loads(arguments.prompts.read_text(encoding="utf-8"))
    if len(images) != len(prompts):
        parser.error(f"{len(images)} images but {len(prompts)} prompts")
    original = SCORERS[arguments.metric](arguments)
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        for path, prompt in zip(images, prompts, strict=True):
            with Image.open(path) as image:
                mode = image.mode
                converted = image.convert("RGB")
            pair = {"image": path.name, "mode": mode, "size": converted.size, "prompt": prompt}
            pair["score"], pair["error"] = attempt(original.score, path, prompt)
            pair["score_rgb"] = pair["score"]
            if mode != "RGB":
                copy = Path(folder) / "converted.png"
                converted.save(copy)
                pair["score_rgb"], pair["error_rgb"] = attempt(original.score, copy, prompt)
            if arguments.pixels and original.resize and pair["score_rgb"] is not None:
                original.resize(converted).save(arguments.pixels / path.name)
            pairs.append(pair)
            print(path.name, pair["score"], pair["score_rgb"], pair["error"] or "", file=sys.stderr, flush=True)
    versions = {"python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in PACKAGES}
    content = {"metric": arguments.metric, "versions": versions, "loading": original.loading, "pairs": pairs}
    arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

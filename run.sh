#!/usr/bin/env bash
# Train on what this machine has: ./run.sh help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'END'
usage: ./run.sh [COMMAND] [--option value ...]

  ./run.sh                      train: with a GPU the single-gpu track, without one the sample track
  ./run.sh baseline             train the AdamW baseline on this machine, for a fair comparison
  ./run.sh attempt -n 4         train with 4 seeds, check and compare them; -h for more
  ./run.sh ablate               try each design choice against one control; -h for more
  ./run.sh screen plan.txt      try many changes side by side, a line each; -h for more
  ./run.sh miniseries           train two recipes at several sizes and lengths; -h for more
  ./run.sh submit "First Last"  bundle the repository as a submission, and check the bundle
  ./run.sh check                look at GPUs, memory, data, disk and versions; a few seconds
  ./run.sh test                 run the test suite
  ./run.sh help                 this text

Options go to train_gpt.py (python train_gpt.py -h lists them): ./run.sh --track gpt2-small
Paths in them are relative to the folder of run.sh, wherever it is started.

NPROC=N ./run.sh      N processes instead of one per GPU (the single-gpu track uses one GPU)
NNODES, NODE_RANK, RDZV_ENDPOINT, RDZV_ID, RDZV_BACKEND, MASTER_ADDR and MASTER_PORT, if set, go to
torchrun: run the same command on every machine.
END
}

command=train
case "${1:-}" in
    train | baseline | attempt | ablate | screen | miniseries | submit | check | test) command=$1; shift ;;
    help | -h | --help) usage; exit ;;
    "" | --*) ;;
    *) usage >&2; echo >&2; echo "error: unknown command '$1'" >&2; exit 2 ;;
esac

# A Python that has the packages: this one, else .venv, which is made on the first run.
fits() {
    "$1" - <<'END' 2>/dev/null
import re, sys
from importlib.metadata import version
assert sys.version_info >= (3, 11)
for line in open("requirements.txt"):
    version(re.split("[=<>~! ]", line.strip())[0])
assert tuple(map(int, version("torch").split(".")[:2])) >= (2, 11)
END
}

find_python() {
    local candidate
    for candidate in python3 python .venv/bin/python; do
        if fits "$candidate"; then python=$candidate; return; fi
    done
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; assert sys.version_info >= (3, 11)' 2>/dev/null; then break; fi
        candidate=
    done
    if [ -z "$candidate" ]; then
        echo "error: Python 3.11 or newer is needed; python3 is $(python3 -V 2>&1 || true)" >&2
        exit 1
    fi
    echo "making .venv and installing requirements.txt into it: once, some minutes" >&2
    if ! "$candidate" -m venv .venv; then
        echo "error: no virtual environment could be made; on Debian and Ubuntu:" \
            "sudo apt install python3-venv" >&2
        exit 1
    fi
    .venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt >&2
    python=.venv/bin/python
}
find_python

if [ "$command" = test ]; then exec "$python" -m pytest "$@"; fi
if [ "$command" = attempt ]; then exec "$python" records/attempt.py "$@"; fi
if [ "$command" = ablate ]; then exec "$python" records/ablate.py "$@"; fi
if [ "$command" = miniseries ]; then exec "$python" records/miniseries.py "$@"; fi
if [ "$command" = screen ]; then exec "$python" records/screen.py "$@"; fi
if [ "$command" = submit ]; then exec "$python" records/submit.py "$@"; fi

gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
value_of() { # value_of NAME OPTIONS...: the value of --NAME, if it is among the options
    local name=$1; shift
    while [ $# -gt 0 ]; do
        case "${1//-/_}" in
            "__$name") echo "${2:-}" ;;
            "__$name="*) echo "${1#*=}" ;;
        esac
        shift
    done
}
track=$(value_of track "$@" | tail -n 1)
resume=$(value_of resume "$@") # has its data, and keeps its micro-batches
if [ -z "$track" ] && [ -n "$resume" ]; then
    track=$("$python" - "$@" <<'END'
import sys, train_gpt
print(train_gpt.parse_hyperparameters(sys.argv[1:]).track)
END
)
fi
if [ -z "$track" ]; then [ "$gpus" -gt 0 ] && track=single-gpu || track=sample; fi
if [ "$command" = baseline ]; then
    [ "$track" = sample ] && set -- --recipe sample-baseline "$@" || set -- --recipe baseline "$@"
fi
nproc=${NPROC:-$([ "$track" = single-gpu ] || [ "$gpus" -eq 0 ] && echo 1 || echo "$gpus")}
if ! [[ $nproc =~ ^[1-9][0-9]*$ ]]; then
    echo "error: NPROC must be a number of processes, got '$nproc'" >&2
    exit 2
fi
nodes=${NNODES:-1}
if ! [[ $nodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]]; then
    echo "error: NNODES must be a number of machines, or FEWEST:MOST, got '$nodes'" >&2
    exit 2
fi
for_all() { # for_all SCRIPT OPTIONS...: told of how many processes there will be
    WORLD_SIZE=$((nproc * ${nodes%%:*})) "$python" "$@"
}
if [ "$command" = check ]; then for_all data/check.py "$@"; exit; fi
if [ "$gpus" -gt 0 ] && [ -z "$resume" ]; then # before gigabytes come for what cannot run
    advice=$(for_all data/check.py --advise "$@")
    # shellcheck disable=SC2086
    if [ -n "$advice" ]; then echo "to fit these GPUs: $advice"; set -- $advice "$@"; fi
fi
if [ "$track" != sample ] && [ -z "$resume$(value_of data_path "$@")" ]; then
    for_all data/cached_fineweb10B.py "$@"
fi

where=--standalone
for name in NNODES NODE_RANK RDZV_ENDPOINT RDZV_ID RDZV_BACKEND MASTER_ADDR MASTER_PORT; do
    if [ -n "${!name:-}" ]; then export "PET_$name=${!name}"; where=; fi
done
if [ "$nproc" = 1 ] && [ -n "$where" ]; then exec "$python" train_gpt.py "$@"; fi
if [[ "${*//-/_}" == *save_on_exit* ]]; then # torchrun would kill after 30 s what has not ended
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(("$(getconf _NPROCESSORS_ONLN)" / nproc + 1))}
if [ -z "$where" ]; then # torchrun says nothing while it waits
    echo "waiting for all machines (NNODES=$nodes) at ${RDZV_ENDPOINT:-${MASTER_ADDR:-localhost}}" >&2
fi
exec "$python" -m torch.distributed.run $where --nproc_per_node="$nproc" train_gpt.py "$@"

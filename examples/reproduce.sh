#!/usr/bin/env bash
# The two main tables of "LLM in a flash" (arXiv 2312.11514), measured on this machine: see docs/reproduce.md.
#
#   examples/reproduce.sh GEOMETRY DIR [LAYERS]
#
# GEOMETRY is a name that `flashlm-prep synthesize --help` lists, such as opt-6.7b; DIR takes the model, what is made of it and
# the figures (four times the model's size). What is there already is not made again. From the environment: MEMORY (50%),
# TOKENS (256), REPEATS (3), RECORD (6144 tokens), RANK (128), DISK_SECONDS (30).
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2; }
geometry=$1 dir=$2 layers=${3:+--layers $3}
root=$(cd "$(dirname "$0")/.." && pwd)
cargo build --release --locked --quiet --manifest-path "$root/Cargo.toml"
bin=${CARGO_TARGET_DIR:-$root/target}/release
mkdir -p "$dir"
cd "$dir"
export FLASHLM_CACHE_DIR=$PWD/disk

step() { printf '\n== %s\n' "$*" >&2; "$@"; }
# shellcheck disable=SC2086 # the option and its value are two words, or none
[ -e checkpoint ] || step "$bin/flashlm-prep" synthesize --geometry "$geometry" $layers -o checkpoint
[ -e predictors/predictors.json ] || {
    step "$bin/flashlm-prep" record checkpoint --random-ids --tokens "${RECORD:-6144}" -o recording
    # Three times as many neurons as are active, as published: 10 % of OPT-6.7B's.
    step "$bin/flashlm-prep" train recording --rank "${RANK:-128}" --epochs 3 --over-fetch 3.03 -o predictors
}
[ -e orders/orders.json ] || step "$bin/flashlm-prep" order recording --predictors predictors --strategy path -o orders
[ -e model.flashlm ] || step "$bin/flashlm-prep" pack checkpoint --predictors predictors --orders orders --recording recording \
    -o model.flashlm
[ -e disk ] || step "$bin/flashlm" disk model.flashlm --seconds "${DISK_SECONDS:-30}" >&2
[ -e bench.json ] || {
    step "$bin/flashlm" bench model.flashlm --memory "${MEMORY:-50%}" --prompt-tokens 128 --tokens "${TOKENS:-256}" \
        --repeats "${REPEATS:-3}" --steps naive,hybrid,predictor,windowing,bundling,overlap --json > bench.json.partial
    mv bench.json.partial bench.json
}

python3 - <<'PYTHON'
import json

bench = json.load(open("bench.json"))
print(f"\n{bench['model_bytes'] / 1e9:.2f} GB in {bench['memory_budget_bytes'] / 1e9:.2f} GB; "
      f"flash read in sequence at {bench['machine']['disk_sequential_bytes_per_s'] / 1e9:.2f} GB/s")
steps = [step for step in bench["steps"] if "not_applicable" not in step]
for step in bench["steps"]:
    if step not in steps:
        print(f"{step['name']}: {step['not_applicable']}")
print("\nTable 2, reading\n\n| techniques | DRAM GB | flash MB a token | GB/s | I/O ms |\n| --- | --- | --- | --- | --- |")
for step in steps:
    read, ms = step["bytes_read_per_token"], step["io_wait_ms"]
    rate = f"{read / ms / 1e6:.2f}" if ms else "-"
    print(f"| {step['name']} | {step['peak_memory_bytes'] / 1e9:.2f} | {read / 1e6:.1f} | {rate} | {ms:.1f} |")
print("\nTable 3, end to end, ms a token\n\n| techniques | I/O | memory management | compute | total | times naive |\n"
      "| --- | --- | --- | --- | --- | --- |")
for step in steps:
    if step["name"] in ("naive", "hybrid", "overlap"):
        total = step["decode_ms_per_token"]["median"]
        naive = steps[0]["decode_ms_per_token"]["median"] if steps[0]["name"] == "naive" else None
        times = f"{naive / total:.1f}" if naive else "-"
        print(f"| {step['name'].replace('overlap', 'all')} | {step['io_wait_ms']:.1f} | {step['planning_ms']:.1f} | "
              f"{step['compute_ms']:.1f} | {total:.1f} | {times} |")
PYTHON

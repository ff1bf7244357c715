#!/usr/bin/env bash
# Runs programs where there is nothing but them: no library, no loader, no /proc, /dev or /etc. Needs root, for chroot.
#
#     scripts/alone.sh DIRECTORY BUNDLE    DIRECTORY has flashlm, and flashlm-prep where that is to be tried as well
#
# What `flashlm run` wrote is printed on standard output, the rest on standard error.
set -euo pipefail
cd "$(dirname "$0")/.."

programs=$1 bundle=$2
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
cp "$programs/flashlm" "$root"
cp "$bundle" "$root/model.flashlm"

alone() {
    echo "alone: $*" >&2
    timeout 120 env -i "$(command -v chroot)" "$root" "$@"
}

alone /flashlm --help >/dev/null
alone /flashlm doctor /model.flashlm >&2
if [ -x "$programs/flashlm-prep" ]; then
    cp "$programs/flashlm-prep" "$root"
    cp -r examples/tiny-opt "$root/tiny-opt"
    alone /flashlm-prep convert /tiny-opt -o /converted.flashlm >&2
    alone /flashlm-prep verify /converted.flashlm >&2
    alone /flashlm run /converted.flashlm --prompt "Once upon a time" -n 5 >&2
fi
alone /flashlm run /model.flashlm --memory 24MB --prompt "Once upon a time" -n 40 --seed 1

#!/usr/bin/env bash
# Builds the programs for a musl target: linked statically, they need nothing of the machine that they run on but its kernel.
# (glibc can be linked statically, too, but then looks for parts of itself at run time: for names of hosts, for random numbers.)
#
#     scripts/static.sh [TARGET [PROGRAM..]]    by default both, for this machine's processor
#
# They are written to target/TARGET/release, without symbols.
set -euo pipefail
cd "$(dirname "$0")/.."

target=${1:-$(uname -m)-unknown-linux-musl}
programs=("${@:2}")
[ "${#programs[@]}" -gt 0 ] || programs=(flashlm flashlm-prep)

[ -d "$(rustc --print target-libdir --target "$target")" ] || rustup target add "$target"
# For the C in `ring`, which `flashlm-prep` links. musl's own compiler knows musl's headers; the system's usually does as well.
compiler=CC_${target//-/_}
[ -n "${!compiler:-}" ] || export "$compiler=$(command -v musl-gcc || echo cc)"

CARGO_PROFILE_RELEASE_STRIP=symbols \
    cargo build --release --locked --target "$target" "${programs[@]/#/--package=}" "${programs[@]/#/--bin=}"

#!/usr/bin/env bash
# Makes the archive that people unpack into ~/.local or /usr/local: programs, manual pages, completions, licences.
#
#     scripts/archive.sh TARGET    the programs of target/TARGET/release, which must run on this machine
#
# It is written to target/archives, with its checksum beside it, and a list of what it would install within it.
set -euo pipefail
cd "$(dirname "$0")/.."

target=${1:?"usage: scripts/archive.sh TARGET, such as x86_64-unknown-linux-musl"}
built=$PWD/target/$target/release
version=$("$built/flashlm" --version | cut -d ' ' -f 2)
name=flashlm-$version-$target
root=target/archives/$name

rm -rf "$root"
mkdir -p "$root/bin" "$root/share/doc/flashlm"
share=$PWD/$root/share
mkdir -p "$share/bash-completion/completions" "$share/zsh/site-functions" "$share/fish/vendor_completions.d"
for program in flashlm flashlm-prep; do
    cp "$built/$program" "$root/bin"
    "$built/$program" man "$share/man/man1"
    "$built/$program" completions bash >"$share/bash-completion/completions/$program"
    "$built/$program" completions zsh >"$share/zsh/site-functions/_$program"
    "$built/$program" completions fish >"$share/fish/vendor_completions.d/$program.fish"
done
cp README.md CHANGELOG.md LICENSE-MIT LICENSE-APACHE docs/install.md "$share/doc/flashlm"
scripts/licences.py "$target" >"$share/doc/flashlm/LICENSES-THIRD-PARTY"
(cd "$root" && find bin share -type f | LC_ALL=C sort >../files && mv ../files share/doc/flashlm/FILES && echo share/doc/flashlm/FILES >>share/doc/flashlm/FILES)

cd target/archives
tar -czf "$name.tar.gz" "$name"
if command -v sha256sum >/dev/null; then sha256sum "$name.tar.gz"; else shasum -a 256 "$name.tar.gz"; fi >"$name.tar.gz.sha256"
cat "$name.tar.gz.sha256"

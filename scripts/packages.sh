#!/usr/bin/env bash
# Makes the packages that crates.io would get, unpacks them elsewhere, and checks that they compile from what is in them.
#
# `cargo package` would compile every dependency once more to do so; here they are the ones that are there already. Not checked:
# that each package compiles without the others' features, and that crates.io takes them.
set -euo pipefail
cd "$(dirname "$0")/.."
target=$(cargo metadata --locked --no-deps --format-version 1 | sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p')

rm -rf "$target/package" "$target/unpacked"
# Tests, benchmarks and examples are left out on purpose; anything else that cargo has to say is a fault.
said=$(cargo package --locked --no-verify --allow-dirty --workspace --exclude flashlm-tests --exclude flashlm-examples 2>&1) || { echo "$said"; exit 1; }
if echo "$said" | grep '^warning' | grep -v -e 'ignoring test' -e 'ignoring benchmark' -e 'ignoring example'; then exit 1; fi

mkdir "$target/unpacked"
cat >"$target/unpacked/Cargo.toml" <<END
[workspace]
members = ["*"]
resolver = "3"

[patch.crates-io]
END
for package in "$target"/package/*.crate; do
    # As of now: packages hold files of long ago, which cargo would take for those that it has checked already.
    tar -xmf "$package" -C "$target/unpacked"
    directory=$(basename "$package" .crate)
    echo "${directory%-*} = { path = \"$directory\" }" >>"$target/unpacked/Cargo.toml"
    for file in README.md LICENSE-MIT LICENSE-APACHE; do
        cmp "$file" "$target/unpacked/$directory/$file"
    done
    for key in description license repository readme keywords categories rust-version; do
        grep -q "^$key = " "$target/unpacked/$directory/Cargo.toml" || { echo "$directory says no $key"; exit 1; }
    done
done
cp Cargo.lock "$target/unpacked"
CARGO_TARGET_DIR=$target cargo check --quiet --release --offline --manifest-path "$target/unpacked/Cargo.toml" --lib --bins --workspace
echo "checked: $(cd "$target/package" && echo *.crate)"
rm -rf "$target/unpacked"

#!/usr/bin/env python3
"""Prints the licences of everything that is linked into the two programs, as who passes the programs on has to.

    scripts/licences.py TARGET
"""

import json
import subprocess
import sys
from pathlib import Path

PROGRAMS = {"flashlm", "flashlm-prep"}
NAMES = ("license", "licence", "copying", "notice", "copyright", "unlicense")


def linked(metadata):
    """Packages of others that the programs link, near and far."""
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    packages = {package["id"]: package for package in metadata["packages"]}
    found, todo = set(), [i for i, package in packages.items() if package["name"] in PROGRAMS]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            kinds = lambda dep: any(kind["kind"] is None for kind in dep["dep_kinds"])
            todo += [dep["pkg"] for dep in nodes[node]["deps"] if kinds(dep)]
    others = [packages[i] for i in found if packages[i]["source"]]
    return sorted(others, key=lambda package: (package["name"], package["version"]))


def texts(package):
    """Its licences as it comes with them."""
    files = sorted(Path(package["manifest_path"]).parent.iterdir())
    files = [file for file in files if file.is_file() and file.name.lower().startswith(NAMES)]
    return [file.read_text("utf-8", "replace").strip() for file in files]


def main():
    command = ["cargo", "metadata", "--locked", "--format-version", "1", "--filter-platform", sys.argv[1]]
    metadata = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    users = {}
    for package in linked(metadata):
        who = f"{package['name']} {package['version']} ({package['license'] or package['license_file']}) {package['repository'] or ''}".rstrip()
        # Where a package comes without the text, its name and the licence's are what there is to say.
        for text in texts(package) or [""]:
            users.setdefault(text, []).append(who)
    if len(users) < 20:
        sys.exit("hardly anything is linked: is the target right?")
    print("What flashlm and flashlm-prep are linked with, and the licences that it comes with. Beside that, Rust's")
    print("standard library (MIT or Apache-2.0, https://www.rust-lang.org/policies/licenses) and, on Linux, musl")
    print("(MIT, https://git.musl-libc.org/cgit/musl/tree/COPYRIGHT).")
    for text, who in users.items():
        print("\n" + "=" * 80 + "\n" + "\n".join(who) + "\n" + "-" * 80 + "\n" + (text or "(It comes without a text.)"))


main()

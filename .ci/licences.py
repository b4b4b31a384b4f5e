#!/usr/bin/env python3
"""Checks the licence and the source of every dependency against deny.toml, where cargo-deny is not to be had.

Reads the same allow-lists. Knows less: it believes what a crate declares, and does not look at licence files.
"""

import json
import re
import subprocess
import sys
import tomllib


def allows(expression: str, allowed: set[str]) -> bool:
    """Evaluates an SPDX expression: AND binds tighter than OR, and `A/B` is an old way to write `A OR B`."""
    tokens = re.findall(r"[()]|[^\s()]+", expression.replace("/", " OR "))

    def alternatives() -> bool:
        value = conjunction()
        while tokens and tokens[0] == "OR":
            tokens.pop(0)
            value = conjunction() or value
        return value

    def conjunction() -> bool:
        value = term()
        while tokens and tokens[0] == "AND":
            tokens.pop(0)
            value = term() and value
        return value

    def term() -> bool:
        token = tokens.pop(0)
        if token == "(":
            value = alternatives()
            tokens.pop(0)
            return value
        # An exception is part of the licence: `Apache-2.0 WITH LLVM-exception` has to be allowed as such.
        if tokens and tokens[0] == "WITH":
            token = f"{token} WITH {tokens[1]}"
            del tokens[:2]
        return token in allowed

    value = alternatives()
    return value and not tokens


def dependencies(targets: list[str]) -> list[dict]:
    command = ["cargo", "metadata", "--format-version=1", "--locked", "--all-features"]
    for target in targets:
        command += ["--filter-platform", target]
    metadata = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    # Packages lists all of Cargo.lock; the resolved graph only what is built for these targets.
    built = {node["id"] for node in metadata["resolve"]["nodes"]}
    members = set(metadata["workspace_members"])
    return [package for package in metadata["packages"] if package["id"] in built - members]


def complaints(package: dict, config: dict):
    name = f"{package['name']} {package['version']}"
    licence = package["license"]
    if not licence:
        yield f"{name}: declares no licence"
    elif not allows(licence, set(config["licenses"]["allow"])):
        yield f"{name}: {licence} is not allowed"
    registries = {f"registry+{url}" for url in config["sources"]["allow-registry"]}
    if package["source"] is not None and package["source"] not in registries:
        yield f"{name}: comes from {package['source']}"


def main() -> int:
    with open(sys.argv[1] if len(sys.argv) > 1 else "deny.toml", "rb") as file:
        config = tomllib.load(file)
    packages = dependencies(config["graph"]["targets"])
    found = [complaint for package in packages for complaint in complaints(package, config)]
    print("\n".join(found) if found else f"{len(packages)} dependencies: licences and sources ok")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

"""As much of `kustomize build` as deploy/kubernetes uses: resources, JSON patches, images.

kustomize itself is no Python package. This refuses everything that it doesn't know, and gives what
`kubectl kustomize` gives.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]
KNOWN = {"apiVersion", "kind", "namespace", "resources", "images", "patches"}
CLUSTER_WIDE = {"Namespace"}


def build(folder: Path) -> list[Manifest]:
    """Every object of a kustomization; ValueError for what can't be applied."""
    given = yaml.safe_load((folder / "kustomization.yaml").read_text())
    if unknown := set(given) - KNOWN:
        raise ValueError(f"{folder}: {unknown} is not understood here")
    objects: list[Manifest] = []
    for resource in given["resources"]:
        path = folder / resource
        objects += build(path) if path.is_dir() else yaml.safe_load_all(path.read_text())
    # YAML's anchors made parts of an object one and the same: patches must not meet that.
    objects = [_unshared(one) for one in objects]
    if namespace := given.get("namespace"):
        for one in objects:
            if one["kind"] not in CLUSTER_WIDE:
                one["metadata"]["namespace"] = namespace
    for patch in given.get("patches", ()):
        targets = [one for one in objects if _matches(one, patch["target"])]
        if not targets:
            raise ValueError(f"{folder}: nothing matches {patch['target']}")
        for one in targets:
            for operation in yaml.safe_load(patch["patch"]):
                _apply(one, operation)
    for container in (c for one in objects for c in _containers(one)):
        name, _, tag = container["image"].rpartition(":")
        for image in given.get("images", ()):
            if image["name"] == name:
                container["image"] = f"{image['newName']}:{tag}"
    return objects


def _matches(one: Manifest, target: dict[str, str]) -> bool:
    name = one["metadata"]["name"]
    return one["kind"] == target["kind"] and bool(re.fullmatch(target.get("name", ".*"), name))


def _apply(one: Manifest, operation: dict[str, Any]) -> None:
    """One operation of RFC 6902; a path that isn't there is an error."""
    *parents, last = operation["path"].split("/")[1:]
    parent: Any = one
    for key in parents:
        parent = parent[int(key) if isinstance(parent, list) else key]
    key = int(last) if isinstance(parent, list) else last
    exists = key in parent if isinstance(parent, dict) else key < len(parent)
    if exists == (operation["op"] == "add"):
        raise ValueError(f"{one['kind']} {one['metadata']['name']}: {operation}")
    if operation["op"] == "remove":
        del parent[key]
    else:
        parent[key] = operation["value"]


def _containers(part: Any) -> Iterator[Manifest]:
    if isinstance(part, list):
        for item in part:
            yield from _containers(item)
    elif isinstance(part, dict):
        for key, value in part.items():
            if key in ("containers", "initContainers"):
                yield from value
            else:
                yield from _containers(value)


def _unshared(part: Any) -> Any:
    if isinstance(part, dict):
        return {key: _unshared(value) for key, value in part.items()}
    return [_unshared(item) for item in part] if isinstance(part, list) else part

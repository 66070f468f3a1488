"""The Kubernetes manifests: each is what its schema says, and what the DaemonSet starts exists."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml  # type: ignore[import-untyped]

from actors.lines import LineProcess
from actors.memory_file import write_memory_file

BASE = Path(__file__).parents[2] / "packaging" / "kubernetes" / "base"
# The oldest in which the fields that we use are there (appArmorProfile: 1.30), and the newest that the package knows.
VERSIONS = ("1.30", kubernetes_validate.latest_version())
CUSTOMIZATION = yaml.safe_load((BASE / "kustomization.yaml").read_text())


def documents() -> list[dict[str, Any]]:
    return [document for name in CUSTOMIZATION["resources"] for document in yaml.safe_load_all((BASE / name).read_text())]


def container() -> dict[str, Any]:
    (daemonset,) = (document for document in documents() if document["kind"] == "DaemonSet")
    (found,) = daemonset["spec"]["template"]["spec"]["containers"]
    return dict(found)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("document", documents(), ids=lambda document: document["kind"])
def test_a_manifest_is_what_its_schema_says(document: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(document, version, strict=True)


def test_every_manifest_is_in_the_base() -> None:
    assert sorted(CUSTOMIZATION["resources"]) == sorted(path.name for path in BASE.glob("*.yaml") if path.stem != "kustomization")


def test_kustomize_builds_the_base() -> None:
    for tool in (["kustomize", "build"], ["kubectl", "kustomize"]):
        if shutil.which(tool[0]):
            break
    else:
        pytest.skip("neither kustomize nor kubectl")
    built = subprocess.run([*tool, BASE], check=True, capture_output=True, text=True).stdout
    image = CUSTOMIZATION["images"][0]
    assert f"image: {image['newName']}:{image['newTag']}" in built
    assert [document["kind"] for document in yaml.safe_load_all(built)] == [document["kind"] for document in documents()]


def test_the_image_is_of_this_version() -> None:
    version = re.search(r'^version = "(.+)"', (BASE.parents[2] / "Cargo.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert CUSTOMIZATION["images"][0]["newTag"] == version[1]


def test_what_the_daemonset_starts_listens(folder: Path) -> None:
    write_memory_file(folder / "guest.mem", 256)
    words = [str(word) for word in container()["command"] + container()["args"]]
    words[0] = str(Path(sys.executable).with_name("latepage"))
    places = {mount["mountPath"] for mount in container()["volumeMounts"]}
    for place in places:
        words = [word.replace(place, str(folder)) for word in words]
    assert not [word for word in words[1:] if word.startswith(("/run", "/var"))], "a path outside what is mounted"
    port = container()["ports"][0]["containerPort"]
    assert f":{port}" in words
    with LineProcess([word if word != f":{port}" else "127.0.0.1:0" for word in words]) as pager:
        pager.event("listening")

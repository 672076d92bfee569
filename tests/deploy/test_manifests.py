"""The files for containers and clusters are valid, and agree with each other and with the package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from embedpool.config import pool_yml
from embedpool.config.config_yml import parse_settings
from embedpool.config.settings import Settings
from embedpool.web.metrics import Metrics
from tests.deploy.conftest import CONF, said, tool

DOCKER, KUBERNETES = CONF / "docker", CONF / "kubernetes"
STATE = "/var/lib/embedpool"
OVERLAYS = ["base", "overlays/gpu", "overlays/keda", "overlays/servicemonitor"]


def rendered(overlay: str) -> str:
    return said(tool("kubectl"), "kustomize", KUBERNETES / overlay)


def objects(overlay: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(rendered(overlay)))


def of_kind(overlay: str, kind: str) -> list[dict[str, Any]]:
    return [found for found in objects(overlay) if found["kind"] == kind]


def pod(overlay: str) -> dict[str, Any]:
    (deployment,) = of_kind(overlay, "Deployment")
    return deployment["spec"]["template"]["spec"]


def file_of(overlay: str, name: str) -> str:
    """The text of a file that a ConfigMap brings."""
    (text,) = [found["data"][name] for found in of_kind(overlay, "ConfigMap") if name in found["data"]]
    return str(text)


def settings_of(file: Path) -> Settings:
    return parse_settings(file.read_text(), str(file), {})


# --- the image and compose


def test_the_dockerfile_is_sound() -> None:
    """hadolint, which knows the usual mistakes, finds none."""
    said(tool("hadolint"), DOCKER / "Dockerfile")


def test_every_image_that_is_named_can_be_built() -> None:
    """A tag of the manifests and of compose is a target of the Dockerfile; the base is pinned by its digest."""
    text = (DOCKER / "Dockerfile").read_text()
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", text, flags=re.MULTILINE))
    files = [DOCKER / "compose.yml", *KUBERNETES.rglob("kustomization.yaml")]
    named = re.findall(r"(?:newTag: |image: embedpool:)(\S+)", "\n".join(file.read_text() for file in files))
    assert set(named) == {"cpu", "cuda"}
    assert set(named) <= targets
    assert re.search(r"^ARG PYTHON_IMAGE=\S+@sha256:[0-9a-f]{64}$", text, flags=re.MULTILINE)


def test_the_compose_file_is_valid() -> None:
    """It has only keys that the specification of compose knows."""
    said(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", DOCKER / "compose.yml")


def test_the_compose_file_gives_no_rights_away() -> None:
    """The server is reached from this machine alone, needs a key, can write its state alone, and may drain."""
    (service,) = yaml.safe_load((DOCKER / "compose.yml").read_text())["services"].values()
    assert [port.rsplit(":", 2)[0] for port in service["ports"]] == ["127.0.0.1"]
    assert service["environment"]["EMBEDPOOL_SECRET_ADMIN"].startswith("${EMBEDPOOL_SECRET_ADMIN:?")
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert [volume.split(":")[1] for volume in service["volumes"]] == [STATE]
    settings = settings_of(DOCKER / "config.yml")
    assert int(service["stop_grace_period"].removesuffix("s")) > settings.server.longest_stop_s


@pytest.mark.parametrize("file", [DOCKER / "config.yml", KUBERNETES / "base" / "config.yml"], ids=["image", "pods"])
def test_the_server_writes_in_one_folder(file: Path) -> None:
    """Whatever it changes by itself lies there, and it is reached from elsewhere with a key alone."""
    settings = settings_of(file)
    paths = settings.paths
    written = [paths.state_dir, paths.logs_dir, paths.cache_dir, settings.process.pid_file]
    written.append(settings.security.keys_file)
    assert [path for path in written if not path.startswith(f"{STATE}/")] == []
    assert settings.server.host == "0.0.0.0"
    assert settings.security.admin_key_env
    assert not settings.security.insecure
    assert paths.config_yml == "/etc/embedpool/config.yml"


# --- Kubernetes


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_manifests_are_valid(overlay: str, tmp_path: Path) -> None:
    """Every key of every object is known to Kubernetes' own schemas; of KEDA's and Prometheus' there are none here."""
    file = tmp_path / "rendered.yml"
    file.write_text(rendered(overlay))
    assert "ERROR" not in said(tool("kubernetes-validate"), "--strict", file)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_have_no_rights(overlay: str) -> None:
    """As the restricted standard of Kubernetes wants it, and with a root that nobody writes."""
    spec = pod(overlay)
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["automountServiceAccountToken"] is False
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {STATE, "/tmp"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_agree_with_their_files(overlay: str) -> None:
    """They may drain, their files are valid and where the settings say, and readiness asks after models of theirs."""
    spec = pod(overlay)
    (container,) = spec["containers"]
    settings = parse_settings(file_of(overlay, "config.yml"), "config.yml", {})
    assert spec["terminationGracePeriodSeconds"] > settings.server.longest_stop_s
    readiness = container["readinessProbe"]
    noticed_s = readiness["periodSeconds"] * readiness["failureThreshold"] + readiness["timeoutSeconds"]
    assert settings.server.drain_delay_s >= noticed_s
    models = pool_yml.parse(file_of(overlay, "pool.yml")).models
    (asked,) = parse_qs(urlsplit(readiness["httpGet"]["path"]).query)["models"]
    assert set(asked.split(",")) <= {name for model in models for name in (model.model, model.alias)}
    folders = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {str(Path(settings.paths.pool_yml).parent), str(Path(settings.paths.config_yml).parent)} <= folders
    named = {settings.security.admin_key_env, settings.security.embed_key_env}
    assert named == {variable["name"] for variable in container["env"]}
    assert container["ports"][0]["containerPort"] == settings.server.port


def test_the_name_for_all_pods_stands_for_their_addresses() -> None:
    """A lookup of a headless service gives the pods, not one address for all; the docs name it."""
    headless = [found for found in of_kind("base", "Service") if found["spec"].get("clusterIP") == "None"]
    (port,) = headless[0]["spec"]["ports"]
    address = f"dns+http://{headless[0]['metadata']['name']}:{port['port']}/embed"
    assert address in (CONF.parent / "docs" / "kubernetes.md").read_text()


def test_keda_asks_for_a_metric_that_exists() -> None:
    """Else the number of pods never changes, and nobody is told."""
    (scaled,) = of_kind("overlays/keda", "ScaledObject")
    (trigger,) = scaled["spec"]["triggers"]
    names = set(re.findall(r"embedpool_\w+", trigger["metadata"]["query"]))
    assert names
    assert names <= {family.name for family in Metrics()._own.collect()}
    (deployment,) = of_kind("overlays/keda", "Deployment")
    assert scaled["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"]
    models = {model.model for model in pool_yml.parse(file_of("overlays/keda", "pool.yml")).models}
    assert set(re.findall(r'model="([^"]+)"', trigger["metadata"]["query"])) <= models


def test_prometheus_reads_each_pod_once() -> None:
    """By one service that has the port, with a key that the pods know."""
    overlay = "overlays/servicemonitor"
    (monitor,) = of_kind(overlay, "ServiceMonitor")
    (endpoint,) = monitor["spec"]["endpoints"]
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    (service,) = [found for found in of_kind(overlay, "Service") if wanted <= found["metadata"]["labels"].items()]
    assert service["metadata"]["name"] == "embedpool-pods"
    assert [port["name"] for port in service["spec"]["ports"]] == [endpoint["port"]]
    (container,) = pod(overlay)["containers"]
    keys = [variable["valueFrom"]["secretKeyRef"] for variable in container["env"]]
    assert endpoint["authorization"]["credentials"] in keys
    assert endpoint["path"] == "/metrics"

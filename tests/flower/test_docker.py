"""The files of docker/, and the commands in them, run without containers."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.flower.federation import fedcore, federation
from tests.helpers import PATIENCE

FOLDER = Path("docker")
COMPOSE = ["compose.yml", "compose.tls.yml"]
MANIFESTS = ["server.yml", "client.yml"]


def compose_commands(file: str) -> dict[str, list[str]]:
    services = yaml.safe_load((FOLDER / file).read_text())["services"]
    return {
        name: [str(word) for word in service["command"]]
        for name, service in services.items()
    }


def manifests(file: str) -> list[dict[str, Any]]:
    return [
        m for m in yaml.safe_load_all((FOLDER / "kubernetes" / file).read_text()) if m
    ]


def kubernetes_commands() -> dict[str, list[str]]:
    found = {}
    for file in MANIFESTS:
        for manifest in manifests(file):
            if manifest["kind"] == "StatefulSet":
                found[manifest["metadata"]["name"].removeprefix("fedcore-")] = [
                    str(word)
                    for word in manifest["spec"]["template"]["spec"]["containers"][0][
                        "args"
                    ]
                ]
    for i in ("1", "2"):  # as its first lines say
        found[f"client-{i}"] = [
            word.replace("client-0", f"client-{i}") if word != "0" else i
            for word in found["client-0"]
        ]
    return found


@pytest.mark.parametrize("file", COMPOSE)
@pytest.mark.skipif(
    shutil.which("docker") is None, reason="the docker client is not here"
)
def test_docker_compose_takes_the_file(file: str) -> None:
    done = subprocess.run(
        ["docker", "compose", "-f", FOLDER / file, "config", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )
    if "is not a docker command" in done.stderr or "unknown" in done.stderr:
        pytest.skip("docker without compose")
    assert done.returncode == 0, done.stderr


def test_containers_run_as_nobody_special_with_nothing_that_they_do_not_need() -> None:
    for file in COMPOSE:
        for name, service in yaml.safe_load((FOLDER / file).read_text())[
            "services"
        ].items():
            assert service["read_only"], name
            assert service["cap_drop"] == ["ALL"], name
    for file in MANIFESTS:
        pods = [
            m["spec"]["template"]["spec"]
            for m in manifests(file)
            if m["kind"] == "StatefulSet"
        ]
        assert pods
        for pod in pods:
            assert pod["securityContext"]["runAsNonRoot"]
            mounted = {
                mount["name"]
                for c in (*pod["containers"], *pod["initContainers"])
                for mount in c["volumeMounts"]
            }
            assert mounted == {volume["name"] for volume in pod["volumes"]}
            for container in pod["containers"]:
                assert container["securityContext"]["readOnlyRootFilesystem"]


def test_the_image_is_pinned_needs_no_root_and_copies_what_there_is() -> None:
    text = (FOLDER / "Dockerfile").read_text()
    (base,) = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base)
    users = re.findall(r"^USER (\S+)", text, re.MULTILINE)
    assert users[-1] == "10001:10001"
    allowed = {
        line[1:]
        for line in Path(".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    for sources in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert Path(source).exists(), source
            assert source in allowed, f"{source} is kept out by .dockerignore"
    (version,) = re.findall(r"^ARG TORCH_VERSION=(\S+)", text, re.MULTILINE)
    assert f"torch=={version}\n" in Path("constraints.txt").read_text()


@pytest.mark.slow
@pytest.mark.timeout(2 * PATIENCE)
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes through /proc")
@pytest.mark.parametrize("kind", [*COMPOSE, "kubernetes"])
def test_the_commands_of_the_containers_train(kind: str, tmp_path: Path) -> None:
    commands = kubernetes_commands() if kind == "kubernetes" else compose_commands(kind)
    assert sorted(commands) == ["client-0", "client-1", "client-2", "server"]
    with federation(tmp_path, 3) as f:
        for name, words in commands.items():
            place = tmp_path / name
            outside = {
                "/certs": f.certs / name,
                "/fedcore/run": f.run,
                "/fedcore/state": place,
                "0.0.0.0:9092": f"127.0.0.1:{f.port}",
            }
            outside |= {"server:9092": f.address, "fedcore-server:9092": f.address}
            f.start(
                name,
                fedcore(
                    *(outside.get(word, word) for word in words),
                    *(("--set", "rounds=1") if name == "server" else ()),
                ),
            )
        result = f.finished()
    assert result["history"][0]["reports"] == 3

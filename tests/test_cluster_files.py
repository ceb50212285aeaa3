"""The files of cluster/: read as those read them for whom they are, and held to a strict schema."""

from __future__ import annotations

import copy
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.autoscaler._private.util import prepare_config, validate_config

from dpldm_dist import __version__
from dpldm_dist.cli import COMMANDS, _parser
from dpldm_dist.config import RunConfig, load_config

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"
LAUNCHED = ("onprem", "aws", "gcp")


# --- `ray up` -------------------------------------------------------------------------------------


def launched(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())


def ray_accepts(config: dict[str, Any]) -> None:
    validate_config(prepare_config(copy.deepcopy(config)))


@pytest.mark.parametrize("name", LAUNCHED)
def test_rays_own_validator_accepts_the_cluster_file_and_refuses_a_wrong_one(name):
    ray_accepts(launched(name))
    for wrong in ({"max_worker": 3}, {"auth": {"ssh_usr": "me"}}, {"docker": {"imag": "x"}}):
        with pytest.raises(jsonschema.ValidationError):
            ray_accepts(launched(name) | wrong)


@pytest.mark.parametrize("name", LAUNCHED)
def test_every_node_asks_for_the_token_and_no_dashboard_is_open_to_the_network(name):
    config = launched(name)
    head, worker = (config[f"{role}_start_ray_commands"][-1] for role in ("head", "worker"))
    for command in (head, worker):
        before, start = command.split("ray start")
        assert "RAY_AUTH_MODE=token" in before and "RAY_AUTH_TOKEN_PATH=" in before
        assert (
            "--object-store-memory=" in start
            and subprocess.run(["sh", "-nc", command]).returncode == 0
        )
    assert "--dashboard-host=127.0.0.1" in head and "$RAY_HEAD_IP:6379" in worker
    assert "~/.ray/auth_token" in config["file_mounts"]
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]


def test_machines_of_ones_own_keep_the_ray_of_others():
    commands = launched("onprem")["head_start_ray_commands"]
    commands += launched("onprem")["worker_start_ray_commands"]
    assert not any("ray stop" in command for command in commands)


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_a_head_runs_no_worker_and_private_data_is_not_copied_to_nodes(name):
    config = launched(name)
    assert config["available_node_types"][config["head_node_type"]]["resources"]["CPU"] == 0
    assert {"/runs/", "/data/"} <= set(config["rsync_exclude"])


# --- Kubernetes -----------------------------------------------------------------------------------
# Of each kind the fields that we use; any other is refused. KubeRay 1.6, ray.io/v1; Kubernetes v1.


def fields(required: str = "", **optional: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": optional,
        "required": required.split(),
        "additionalProperties": False,
    }


TEXT, NUMBER, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
QUANTITY = {"type": "string", "pattern": r"^\d+(\.\d+)?(m|Ki|Mi|Gi|Ti)?$"}
PORT = {"type": "integer", "minimum": 1, "maximum": 65535}


def many(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


METADATA = fields("name", name=NAME, labels=TEXTS)
AMOUNTS = {"type": "object", "additionalProperties": QUANTITY}
PROBE = fields(
    "httpGet",
    httpGet=fields("path port", path=TEXT, port=PORT),
    initialDelaySeconds=NUMBER, periodSeconds=NUMBER, timeoutSeconds=NUMBER, failureThreshold=NUMBER,
)  # fmt: skip
CONTAINER = fields(
    "name image resources volumeMounts readinessProbe livenessProbe",
    name=NAME, image=TEXT, command=many(TEXT), env=many(fields("name value", name=TEXT, value=TEXT)),
    ports=many(fields("name containerPort", name=NAME, containerPort=PORT)),
    resources=fields("requests limits", requests=AMOUNTS, limits=AMOUNTS),
    volumeMounts=many(
        fields("name mountPath", name=NAME, mountPath=TEXT, subPath=TEXT, readOnly=FLAG)
    ),
    readinessProbe=PROBE, livenessProbe=PROBE,
)  # fmt: skip
VOLUME = fields(
    "name",
    name=NAME,
    persistentVolumeClaim=fields("claimName", claimName=NAME, readOnly=FLAG),
    emptyDir=fields("medium sizeLimit", medium={"enum": ["Memory"]}, sizeLimit=QUANTITY),
)
POD = fields(
    "spec",
    metadata=fields(labels=TEXTS),
    spec=fields(
        "containers volumes securityContext",
        containers=many(CONTAINER), volumes=many(VOLUME), terminationGracePeriodSeconds=NUMBER,
        securityContext=fields("runAsNonRoot runAsUser", runAsNonRoot=FLAG, runAsUser=NUMBER),
        automountServiceAccountToken=FLAG,
    ),
)  # fmt: skip
RAY_CLUSTER = fields(
    "authOptions rayVersion headGroupSpec workerGroupSpecs",
    authOptions=fields("mode secretName", mode={"enum": ["token"]}, secretName=NAME),
    rayVersion=TEXT,
    headGroupSpec=fields("rayStartParams template", rayStartParams=TEXTS, template=POD),
    workerGroupSpecs=many(
        fields(
            "groupName replicas minReplicas maxReplicas rayStartParams template",
            groupName=NAME, replicas=NUMBER, minReplicas=NUMBER, maxReplicas=NUMBER,
            rayStartParams=TEXTS, template=POD,
        )
    ),
)  # fmt: skip
SPECS = {
    ("v1", "PersistentVolumeClaim"): fields(
        "accessModes resources",
        accessModes=many({"enum": ["ReadWriteMany"]}),
        resources=fields("requests", requests=AMOUNTS),
    ),
    ("v1", "Service"): fields(
        "selector ports",
        selector=TEXTS,
        ports=many(fields("name port targetPort", name=NAME, port=PORT, targetPort=PORT)),
    ),
    ("apps/v1", "Deployment"): fields(
        "replicas selector template",
        replicas=NUMBER,
        selector=fields("matchLabels", matchLabels=TEXTS),
        template=POD,
    ),
    ("ray.io/v1", "RayCluster"): RAY_CLUSTER,
    ("ray.io/v1", "RayJob"): fields(
        "entrypoint rayClusterSpec",
        entrypoint=TEXT, backoffLimit=NUMBER, shutdownAfterJobFinishes=FLAG, runtimeEnvYAML=TEXT,
        rayClusterSpec=RAY_CLUSTER,
    ),
}  # fmt: skip


def manifests() -> list[dict[str, Any]]:
    files = sorted((CLUSTER / "kubernetes").glob("*.yaml"))
    return [item for file in files for item in yaml.safe_load_all(file.read_text())]


def manifest(kind: str) -> dict[str, Any]:
    (found,) = (item for item in manifests() if item["kind"] == kind)
    return found


def validate(item: dict[str, Any]) -> None:
    spec = SPECS[item["apiVersion"], item["kind"]]
    whole = fields(
        "apiVersion kind metadata spec", apiVersion=TEXT, kind=TEXT, metadata=METADATA, spec=spec
    )
    jsonschema.Draft202012Validator(whole).validate(item)


def pods(item: dict[str, Any]) -> list[dict[str, Any]]:
    """All pod specs anywhere in a manifest."""
    if isinstance(item, dict):
        mine = [item] if "containers" in item else []
        return mine + [pod for part in item.values() for pod in pods(part)]
    return [pod for part in item for pod in pods(part)] if isinstance(item, list) else []


ALL_PODS = [(item["kind"], pod) for item in manifests() for pod in pods(item)]


@pytest.mark.parametrize("item", manifests(), ids=lambda item: item["kind"])
def test_a_manifest_has_known_fields_of_the_right_type_only(item):
    validate(item)


def places(item: Any, path: tuple = ()) -> list[tuple]:
    """The path of every mapping in a manifest whose names are fixed by its kind."""
    if isinstance(item, list):
        return [found for i, part in enumerate(item) for found in places(part, (*path, i))]
    return (
        [path, *(p for k, v in item.items() for p in places(v, (*path, k)))]
        if isinstance(item, dict)
        else []
    )


@pytest.mark.parametrize("item", manifests(), ids=lambda item: item["kind"])
def test_a_misspelt_field_anywhere_is_noticed(item):
    free = {"labels", "matchLabels", "selector", "rayStartParams", "requests", "limits"}
    for path in places(item):
        if free & {path[-1] if path else ""} and path != ("spec", "selector"):
            continue
        if path[-1:] == ("selector",) and item["kind"] == "Service":
            continue
        wrong = copy.deepcopy(item)
        part = wrong
        for step in path:
            part = part[step]
        part["surplus"] = True
        with pytest.raises(jsonschema.ValidationError):
            validate(wrong)


def test_a_run_of_its_own_and_a_cluster_that_stays_have_the_same_nodes():
    assert manifest("RayJob")["spec"]["rayClusterSpec"] == manifest("RayCluster")["spec"]
    assert manifest("RayCluster")["spec"]["rayVersion"] == ray.__version__


def test_ray_itself_reads_the_resources_of_the_pods_as_meant():
    cluster = copy.deepcopy(manifest("RayCluster"))
    cluster["metadata"]["namespace"] = "default"
    found = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    assert found["headgroup"]["resources"]["CPU"] == 0, "no worker beside the driver"
    assert found["workers"]["resources"]["CPU"] == 1, "one worker in each pod"
    assert (found["workers"]["min_workers"], found["workers"]["max_workers"]) == (1, 4)


@pytest.mark.parametrize(("kind", "pod"), ALL_PODS, ids=[kind for kind, _ in ALL_PODS])
def test_every_pod_has_the_shared_volume_bounded_resources_and_no_root(kind, pod):
    claim = manifest("PersistentVolumeClaim")["metadata"]["name"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim
    assert pod["securityContext"]["runAsNonRoot"] and "fsGroup" not in pod["securityContext"]
    for container in pod["containers"]:
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == set(volumes) and "memory" in container["resources"]["limits"]
        assert container["image"].endswith(f":{__version__.partition('.dev')[0]}")
    if kind != "Deployment":
        paths = [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]]
        assert "/dev/shm" in paths and volumes["shm"]["emptyDir"]["medium"] == "Memory"


def test_a_pod_that_must_leave_has_time_for_the_run_to_save():
    grace_s = RunConfig().stop_grace_s
    for kind, pod in ALL_PODS:
        if kind == "Deployment":
            continue
        (drain,) = (
            variable["value"]
            for variable in pod["containers"][0]["env"]
            if variable["name"] == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
        )
        assert grace_s < float(drain) < pod["terminationGracePeriodSeconds"]


def test_tensorboard_sees_nothing_private():
    (pod,) = pods(manifest("Deployment"))
    (mount,) = pod["containers"][0]["volumeMounts"]
    assert mount["readOnly"] and mount["subPath"].endswith("/release/tensorboard")
    service = manifest("Service")["spec"]
    assert service["selector"] == manifest("Deployment")["spec"]["template"]["metadata"]["labels"]


def test_the_run_of_the_job_is_a_command_of_ours_that_resumes_on_other_numbers_of_workers():
    job = manifest("RayJob")["spec"]
    words = shlex.split(job["entrypoint"])
    assert words[:3] == ["python", "-m", "dpldm_dist"]
    options = _parser().parse_args(words[3:])
    run = load_config(None, options.set).run
    group = job["rayClusterSpec"]["workerGroupSpecs"][0]
    assert (run.launcher, run.ray_address) == ("ray", "auto")
    assert run.workers == (group["minReplicas"], group["maxReplicas"])
    cpu = group["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"]
    assert run.threads == int(cpu) and job["backoffLimit"] > 0
    stop_s = yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]
    assert int(stop_s) > run.stop_grace_s


# --- the rest -------------------------------------------------------------------------------------


def test_submit_is_a_sound_script_that_hands_over_to_our_command(tmp_path):
    script = CLUSTER / "submit.sh"
    assert script.stat().st_mode & 0o111
    fake = tmp_path / "dpldm"
    fake.write_text(
        '#!/bin/sh\necho "$RAY_API_SERVER_ADDRESS $RAY_AUTH_MODE"; echo "$@"; exit 75\n'
    )
    fake.chmod(0o755)
    words = ["finetune", "--set", "run.dir=a b"]
    ended = subprocess.run(
        [str(script), *words], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True
    )  # fmt: skip
    assert ended.returncode == 75, "the exit code of the job"
    assert ended.stdout == "http://127.0.0.1:8265 token\nsubmit finetune --set run.dir=a b\n"
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", "-S", "warning", str(script)]).returncode == 0


def test_the_image_has_the_package_and_no_data():
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    copied = [line.split()[1:-1] for line in lines if line.startswith("COPY")]
    assert copied == [["pyproject.toml", "README.md", "LICENSE"], ["dpldm_dist"]]
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (torch,) = (name for name in needed if name.startswith("torch=="))
    assert any(torch in line for line in lines)


def test_the_readme_names_files_options_and_commands_that_exist():
    text = (CLUSTER / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (CLUSTER / target).exists(), target
    for path in re.findall(r"(?<![\w/])cluster/[\w./-]+\w", text):
        assert (ROOT / path).exists(), path
    for option in re.findall(r"`(?:--set )?run\.(\w+)", text):
        assert option in RunConfig.model_fields, option
    for command in re.findall(r"dpldm (\w+)", text):
        assert command in COMMANDS, command

"""The files in cluster/, checked offline: against Ray's own schema, KubeRay's CRD, and what we promise.

Each check is also shown a copy with a fault in it, which it must find.
"""

from __future__ import annotations

import copy
import gzip
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from rayva.orchestration.entry import _parser
from rayva.orchestration.pipeline import STEPS
from rayva.recipes import require_runnable, resolve

ROOT = Path(__file__).resolve().parents[2]
AWS = ROOT / "cluster" / "aws-a100.yaml"
RAYJOB = ROOT / "cluster" / "kuberay" / "rayjob.yaml"
RUNTIME_ENV = ROOT / "cluster" / "runtime_env.yaml"
CRD = Path(__file__).parent / "kuberay_crd" / "rayjob.v1.json.gz"

RECIPE = resolve("llava-13b")
Json = dict[str, Any]


def load(path: Path) -> Json:
    content = yaml.safe_load(path.read_text())
    assert isinstance(content, dict)
    return content


def changed(content: Json, path: tuple[Any, ...], value: Any = None, *, rename: str | None = None) -> Json:
    """A copy in which `path` has another value, another name, or (neither given) is gone."""
    content = copy.deepcopy(content)
    *parents, last = path
    section: Any = content
    for part in parents:
        section = section[part]
    old = section.pop(last) if isinstance(section, dict) else section[last]
    if rename is not None:
        section[rename] = old
    elif value is not None:
        section[last] = value
    return content


# --- ray up ---


def validate_aws(content: Json) -> None:
    """Ray's own check of a cluster file, as `ray up` makes it."""
    validate_config(prepare_config(copy.deepcopy(content)))


def aws_faults(content: Json) -> Iterator[str]:
    """What Ray accepts and we do not."""
    head = content["head_node_type"]
    for name, node in content["available_node_types"].items():
        # Without a group of its own Ray makes one with port 22 open to 0.0.0.0/0, whatever
        # provider.security_group says.
        if not node["node_config"].get("SecurityGroupIds"):
            yield f"{name}: Ray would open SSH to the world"
        if node["node_config"].get("IamInstanceProfile") is None:
            yield f"{name}: no instance profile, so no storage"
        if name == head and any(node["resources"].get(kind) != 0 for kind in ("CPU", "GPU")):
            yield f"{name}: the head takes part in the work"
    for text in texts(content):
        if "0.0.0.0" in text or "::/0" in text:
            yield f"open to the world: {text}"
    for which in ("head", "worker"):
        yield from start_faults(which, content[f"{which}_start_ray_commands"])
    if not any("auth_token" in target for target in content["file_mounts"]):
        yield "the token does not get onto the nodes"
    if "-r ~/rayva/constraints.txt" not in " ".join(content["setup_commands"]):
        yield "packages are not pinned"
    if content["docker"]["image"].partition(":")[2].partition("-")[0] != ray_pin():
        yield "the image has another Ray than constraints.txt"
    yield from aws_size_faults(content)


def start_faults(which: str, commands: list[str]) -> Iterator[str]:
    starts = [command for command in commands if "ray start" in command]
    if len(starts) != 1:
        yield f"{which}: {len(starts)} start commands"
    for command in starts:
        before = command.partition("ray start")[0]
        if "RAY_AUTH_MODE=token" not in before or "RAY_AUTH_TOKEN_PATH=" not in before:
            yield f"{which}: starts without token authentication"
        if which == "head" and "--dashboard-host=127.0.0.1" not in command:
            yield "the dashboard is not bound to loopback"
        if not command.startswith("cd ~/rayva &&"):
            yield f"{which}: not started in the checkout"


def aws_size_faults(content: Json) -> Iterator[str]:
    workers = [node for name, node in content["available_node_types"].items() if name != "head"]
    gpu_nodes = [node for node in workers if node["resources"].get("GPU")]
    yield from size_faults(
        [(node["resources"]["GPU"], node["resources"]["CPU"], node["min_workers"]) for node in gpu_nodes]
    )
    if not any(node["max_workers"] for node in workers if not node["resources"].get("GPU")):
        yield "there is no decoder"
    if content["max_workers"] < sum(node["max_workers"] for node in workers):
        yield "max_workers holds node types back"


def size_faults(gpu_nodes: list[tuple[int, int, int]]) -> Iterator[str]:
    """Compares nodes (GPUs, CPUs, how many) with what the recipe asks for."""
    scaling, features = RECIPE.scaling, RECIPE.features
    gpus = sum(gpu * count for gpu, _, count in gpu_nodes)
    if gpus != scaling.workers * scaling.gpus_per_worker:
        yield f"{gpus} GPUs, but the recipe trains on {scaling.workers * scaling.gpus_per_worker:g}"
    if gpus < features.encoders * features.encoder_gpus or gpus < RECIPE.evaluation.gpus:
        yield "too few GPUs for the encoders or the evaluation"
    for gpu, cpu, _ in gpu_nodes:
        if cpu < gpu / scaling.gpus_per_worker * scaling.cpus_per_worker:
            yield "too few CPUs beside the GPUs"


def texts(content: Any) -> Iterator[str]:
    if isinstance(content, dict):
        content = [*content, *content.values()]
    if isinstance(content, list):
        for item in content:
            yield from texts(item)
    elif isinstance(content, str):
        yield content


def ray_pin() -> str:
    found = re.search(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found
    return found[1]


def test_ray_accepts_the_aws_file() -> None:
    validate_aws(load(AWS))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (("idle_timeout_minutes",), "idle_timeout_minute"),
        (("available_node_types", "a100", "min_workers"), "min_worker"),
        (("docker", "image"), "imag"),
        (("available_node_types", "head"), "haed"),
    ],
)
def test_ray_refuses_a_misspelt_key_in_the_aws_file(path: tuple[str, ...], name: str) -> None:
    with pytest.raises((jsonschema.ValidationError, ValueError, AssertionError)):
        validate_aws(changed(load(AWS), path, rename=name))


def test_the_aws_file_keeps_our_promises() -> None:
    assert list(aws_faults(load(AWS))) == []


_NODES = "available_node_types"
_OPEN_DASHBOARD = "cd ~/rayva && RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=t ray start --head"


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        ((_NODES, "head", "node_config", "SecurityGroupIds"), None, "open SSH to the world"),
        ((_NODES, "decoder", "node_config", "SecurityGroupIds"), [], "open SSH to the world"),
        (("provider", "security_group"), {"IpPermissions": [{"CidrIp": "0.0.0.0/0"}]}, "open to the world"),
        ((_NODES, "a100", "node_config", "IamInstanceProfile"), None, "no instance profile"),
        ((_NODES, "head", "resources"), {"CPU": 8, "GPU": 0}, "takes part in the work"),
        ((_NODES, "head", "resources", "CPU"), None, "takes part in the work"),
        ((_NODES, "a100", "resources", "GPU"), 4, "GPUs, but the recipe"),
        ((_NODES, "a100", "min_workers"), 2, "GPUs, but the recipe"),
        ((_NODES, "a100", "resources", "CPU"), 32, "too few CPUs"),
        ((_NODES, "decoder", "max_workers"), 0, "no decoder"),
        (("max_workers",), 1, "holds node types back"),
        (("worker_start_ray_commands", 1), "cd ~/rayva && ray start", "without token"),
        (("head_start_ray_commands", 1), "cd ~/rayva && ray start --head", "without token"),
        (("head_start_ray_commands", 1), _OPEN_DASHBOARD, "not bound to loopback"),
        (("file_mounts", "~/.ray/auth_token"), None, "token does not get"),
        (("setup_commands",), ["pip install ray"], "not pinned"),
        (("docker", "image"), "rayproject/ray:2.50.0-py311-gpu", "another Ray"),
    ],
)
def test_a_broken_promise_in_the_aws_file_is_found(path: tuple[Any, ...], value: Any, fault: str) -> None:
    content = load(AWS)
    content["provider"].setdefault("security_group", {})
    assert any(fault in found for found in aws_faults(changed(content, path, value)))


def test_what_the_aws_file_carries_to_the_nodes_is_in_the_checkout() -> None:
    sources = {local for local in load(AWS)["file_mounts"].values() if not local.startswith(("~", ".git/"))}
    assert "platform" in sources
    assert [source for source in sorted(sources) if not (ROOT / source).exists()] == []


# --- KubeRay ---


def strict(schema: Any) -> Any:
    """A CRD's schema as `kubectl --validate=strict` reads it: objects have no fields but the listed ones."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    # `properties` may itself be the name of a field; then its value is no type declaration.
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        closed.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
    return closed


def fill_defaults(schema: Json, content: Any) -> None:
    """Puts in what the API server puts in before it validates."""
    if isinstance(content, dict):
        for name, below in schema.get("properties", {}).items():
            if name not in content and "default" in below:
                content[name] = copy.deepcopy(below["default"])
        for name, value in content.items():
            other = schema.get("additionalProperties")
            fill_defaults(
                schema.get("properties", {}).get(name, other if isinstance(other, dict) else {}), value
            )
    elif isinstance(content, list):
        for value in content:
            fill_defaults(schema.get("items", {}), value)


@pytest.fixture(scope="module")
def crd() -> Json:
    schema = json.loads(gzip.decompress(CRD.read_bytes()))
    assert isinstance(schema, dict)
    return schema


def crd_faults(schema: Json, content: Json) -> list[str]:
    content = copy.deepcopy(content)
    fill_defaults(schema, content)
    return [error.message for error in jsonschema.Draft202012Validator(strict(schema)).iter_errors(content)]


def pods(content: Json) -> Iterator[tuple[str, Json]]:
    """Each group's name and its group section."""
    cluster = content["spec"]["rayClusterSpec"]
    yield "head", cluster["headGroupSpec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group


_SPEC = {
    "submissionMode", "entrypoint", "runtimeEnvYAML", "backoffLimit", "activeDeadlineSeconds",
    "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec",
}  # fmt: skip
_CLUSTER = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
_GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template", "serviceType"}


def rayjob_faults(content: Json) -> Iterator[str]:
    """The object's shape as far as we use it, and what we promise of it; needs no CRD."""
    spec, cluster = content["spec"], content["spec"].get("rayClusterSpec", {})
    if (content.get("apiVersion"), content.get("kind")) != ("ray.io/v1", "RayJob"):
        yield "not a RayJob of ray.io/v1"
    for known, given in ((_SPEC, spec), (_CLUSTER, cluster)):
        yield from (f"unknown or missing: {key}" for key in known ^ set(given))
    if known_faults := [key for _, group in pods(content) for key in set(group) - _GROUP]:
        yield f"unknown in a group: {known_faults}"
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "no token authentication"
    if cluster.get("rayVersion") != ray_pin():
        yield "another Ray than constraints.txt"
    if not (spec.get("shutdownAfterJobFinishes") and spec.get("activeDeadlineSeconds")):
        yield "the cluster may stay up for ever"
    head = cluster["headGroupSpec"]
    if head["rayStartParams"].get("num-cpus") != "0" or head.get("serviceType") != "ClusterIP":
        yield "the head takes part in the work or is reachable from outside"
    gpu_nodes = []
    for name, group in pods(content):
        [container] = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        if limits != container["resources"]["requests"]:
            yield f"{name}: requests differ from limits"
        if "nvidia.com/gpu" in limits:
            gpu_nodes.append((limits["nvidia.com/gpu"], int(limits["cpu"]), group["replicas"]))
    yield from size_faults(gpu_nodes)


def test_the_rayjob_keeps_our_promises() -> None:
    assert list(rayjob_faults(load(RAYJOB))) == []


_RAY = ("spec", "rayClusterSpec")
_A100 = (*_RAY, "workerGroupSpecs", 1)


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        (("kind",), "RayCluster", "not a RayJob"),
        ((*_RAY, "authOptions", "mode"), "disabled", "no token"),
        ((*_RAY, "rayVersion"), "2.50.0", "another Ray"),
        (("spec", "shutdownAfterJobFinishes"), False, "stay up"),
        ((*_RAY, "headGroupSpec", "rayStartParams"), {}, "takes part"),
        ((*_RAY, "headGroupSpec", "serviceType"), "LoadBalancer", "reachable from outside"),
        ((*_A100, "replicas"), 2, "GPUs, but the recipe"),
        ((*_A100, "replica"), 1, "unknown in a group"),
    ],
)
def test_a_broken_promise_in_the_rayjob_is_found(path: tuple[Any, ...], value: Any, fault: str) -> None:
    content = load(RAYJOB)
    *parents, last = path
    section: Any = content
    for part in parents:
        section = section[part]
    section[last] = value
    assert any(fault in found for found in rayjob_faults(content))


_MISSPELT = [
    (("spec", "backoffLimit"), "backOffLimit"),
    ((*_RAY, "authOptions"), "authOption"),
    ((*_RAY, "headGroupSpec", "rayStartParams"), "rayStartParam"),
    ((*_A100, "minReplicas"), "minReplica"),
]


@pytest.mark.parametrize(("path", "name"), _MISSPELT)
def test_a_misspelt_key_in_the_rayjob_is_found_without_the_crd(path: tuple[Any, ...], name: str) -> None:
    content = load(RAYJOB)
    *parents, last = path
    section: Any = content
    for part in parents:
        section = section[part]
    section[name] = section[last]
    assert any(name in found for found in rayjob_faults(content))


def test_the_crd_accepts_the_rayjob(crd: Json) -> None:
    assert crd_faults(crd, load(RAYJOB)) == []


_POD = (*_A100, "template", "spec", "containers", 0)


@pytest.mark.parametrize(("path", "name"), [*_MISSPELT, ((*_POD, "image"), "imgae")])
def test_the_crd_refuses_a_misspelt_key(crd: Json, path: tuple[Any, ...], name: str) -> None:
    assert any(name in fault for fault in crd_faults(crd, changed(load(RAYJOB), path, rename=name)))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((*_RAY, "headGroupSpec", "rayStartParams", "num-cpus"), 1),
        ((*_RAY, "authOptions", "mode"), "tokens"),
        ((*_POD, "resources", "limits", "memory"), "1000 GiB"),
        (("spec", "backoffLimit"), "2"),
    ],
)
def test_the_crd_refuses_a_wrong_value(crd: Json, path: tuple[Any, ...], value: Any) -> None:
    assert crd_faults(crd, changed(load(RAYJOB), path, value)) != []


def test_the_rayjobs_command_is_one_that_full_py_takes() -> None:
    python, script, *arguments = shlex.split(load(RAYJOB)["spec"]["entrypoint"])
    assert (python, script) == ("python", "pipelines/full.py")
    options = _parser(None, STEPS).parse_args(arguments)
    recipe = resolve(options.recipe, options.config, options.overrides)
    require_runnable(recipe)
    assert recipe.scaling == RECIPE.scaling
    # MLflow's SQLite store needs a local disk.
    assert "://" in options.storage
    assert recipe.tracking.uri


# --- the code that goes along ---


def test_both_runtime_environments_put_platform_on_the_path_of_a_copy_of_the_code() -> None:
    for environment in (load(RUNTIME_ENV), yaml.safe_load(load(RAYJOB)["spec"]["runtimeEnvYAML"])):
        assert environment["env_vars"]["PYTHONPATH"] == "platform"
        assert environment["working_dir"]
        assert set(environment) <= {"working_dir", "env_vars", "excludes"}


def test_what_stays_behind_is_nothing_that_a_job_needs() -> None:
    excluded = {pattern.strip("/") for pattern in load(RUNTIME_ENV)["excludes"]}
    assert {".git", ".venv", "runs"} <= excluded
    assert excluded.isdisjoint({"platform", "pipelines", "serve", "cluster", "pyproject.toml"})

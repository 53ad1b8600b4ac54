"""Joining or starting Ray, and proving that the workers run the code that was submitted."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
from pathlib import Path
from typing import Any

from rayva.data.locations import absolute, is_local, parent
from rayva.errors import CapacityError, DataError, RayvaError, StorageError
from rayva.orchestration.console import command_again
from rayva.provenance import REPOSITORY, SOURCE_ROOT, code_version, tree_id
from rayva.recipes.schema import STAGES, Recipe
from rayva.storage import Storage

__all__ = ["check_capacity", "code_version", "start_ray", "stop_ray"]

log = logging.getLogger(__name__)

_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_EXCLUDES = [".git", ".venv", "/runs/", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis"]
_OBJECT_STORE_BYTES = 1 << 30
_START_TIMEOUT_SECONDS = 300.0
_own_clusters: list[str] = []
"""Address of the cluster that this process has started, while it runs."""


def start_ray(recipe: Recipe, storage: Storage | None = None) -> None:
    """Joins the job's cluster, or starts one on this machine; then checks it before any work is done.

    In a Ray job, or where RAY_ADDRESS is set, the cluster is joined. The code goes along: with the job's
    own working_dir, or, where it has none, uploaded from the checkout that is running.

    Raises:
        CapacityError: the cluster has less than the recipe asks for.
        RayvaError: a worker does not run this code.
        StorageError: a node cannot see the storage root.
        DataError: a node cannot see images or weights that the recipe gives as a local path.
    """
    import ray

    if not ray.is_initialized():
        handler = signal.getsignal(signal.SIGTERM)
        _join(storage) if _cluster_given() else _start_local()
        signal.signal(signal.SIGTERM, handler)  # ray.init puts its own in place
    check_capacity(recipe)
    _check_nodes(storage, recipe)


def stop_ray() -> None:
    """Leaves the cluster; ends it if it was started here."""
    import ray

    ray.shutdown()
    _own_clusters.clear()


def started_here() -> bool:
    """Whether the cluster was started by this process, and not joined."""
    return bool(_own_clusters)


def _cluster_given() -> bool:
    return bool(os.environ.get("RAY_ADDRESS") or os.environ.get(_JOB_CONFIG))


def _start_local() -> None:
    import ray

    # Workers inherit the environment of the process that starts Ray.
    parts = [str(SOURCE_ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(parts))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local",
        include_dashboard=False,
        logging_level=logging.WARNING,
        object_store_memory=_OBJECT_STORE_BYTES,
    )
    _own_clusters.append(ray.get_runtime_context().gcs_address)


def _join(storage: Storage | None) -> None:
    import ray
    from ray.exceptions import RuntimeEnvSetupError

    try:
        ray.init(address="auto", runtime_env=_runtime_env(storage), logging_level=logging.WARNING)
    except RuntimeEnvSetupError as error:
        raise RayvaError(
            f"The code could not be uploaded to the cluster: {error}",
            "keep large files out of the checkout, or list them in .rayignore",
        ) from error
    except ConnectionError as error:
        raise RayvaError(
            f"The Ray cluster at {os.environ.get('RAY_ADDRESS')} cannot be reached: {error}",
            "check RAY_ADDRESS, or unset it to run on this machine alone",
        ) from error


def _runtime_env(storage: Storage | None) -> dict[str, Any]:
    """What this driver must add to the job's own runtime environment so that workers get the code."""
    given = json.loads(os.environ.get(_JOB_CONFIG, "{}")).get("runtime_env") or {}
    environment: dict[str, Any] = {}
    if given.get("working_dir"):
        # Ray starts the driver and the workers in their copies of it, so that a relative path will do.
        source = os.path.relpath(SOURCE_ROOT, os.getcwd())
        if source.startswith(os.pardir):
            raise RayvaError(
                f"This job's working_dir does not hold the code that it runs ({SOURCE_ROOT}).",
                f"submit from the checkout: {command_again()}",
            )
    else:
        source = SOURCE_ROOT.name
        environment["working_dir"] = str(REPOSITORY)
        environment["excludes"] = [*_EXCLUDES, *_inside_checkout(storage)]
    # Ray refuses a variable that the job already has, even with the same value.
    if "PYTHONPATH" not in (given.get("env_vars") or {}):
        environment["env_vars"] = {"PYTHONPATH": source}
    return environment


def _inside_checkout(storage: Storage | None) -> list[str]:
    """The storage root as a pattern to leave out of the upload, if it lies in the checkout."""
    if storage is None or not storage.is_local or not Path(storage.root).is_relative_to(REPOSITORY):
        return []
    rel = Path(storage.root).relative_to(REPOSITORY).as_posix()
    return [f"/{rel}/"] if rel != "." else []


def check_capacity(recipe: Recipe) -> None:
    """Compares what the recipe asks for with what the cluster has, or may grow to.

    Raises:
        CapacityError: names both numbers and the settings to change.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    # Set only where an autoscaler runs; there, nodes that are still to come count too.
    limits: dict[str, float] | None = ray._private.state.state.get_max_resources_from_cluster_config()
    total = {
        kind: max(sum(node.get(kind, 0.0) for node in nodes), (limits or {}).get(kind, 0.0))
        for kind in ("CPU", "GPU")
    }
    scaling, features = recipe.scaling, recipe.features
    _check_group(
        total, "training workers", ("scaling.workers", scaling.min_workers),
        {"CPU": ("scaling.cpus_per_worker", scaling.cpus_per_worker),
         "GPU": ("scaling.gpus_per_worker", scaling.gpus_per_worker)},
    )  # fmt: skip
    # One decoder works beside the encoders.
    left = {**total, "CPU": total["CPU"] - features.decoder_cpus}
    _check_group(
        left, "encoders beside a decoder", ("features.encoders", features.encoders),
        {"CPU": ("features.encoder_cpus", features.encoder_cpus),
         "GPU": ("features.encoder_gpus", features.encoder_gpus)},
    )  # fmt: skip
    if recipe.evaluation.gpus > total["GPU"]:
        raise CapacityError(
            f"The recipe asks for {recipe.evaluation.gpus:g} GPUs for the evaluation, but the cluster has "
            f"{total['GPU']:g}.",
            "set evaluation.gpus=0, or add nodes with GPUs",
        )
    if not limits:
        _check_placement(recipe, nodes)


def _check_group(
    available: dict[str, float],
    what: str,
    count: tuple[str, int],
    each: dict[str, tuple[str, float]],
) -> None:
    """Checks that `count` actors fit the cluster's totals; both are given with the setting's name."""
    for kind, (setting, amount) in each.items():
        if count[1] * amount > available[kind]:
            fitting = max(int(available[kind] / amount), 0)
            remedy = f"set {count[0]}={fitting}" if fitting else f"set {setting}={max(available[kind], 0):g}"
            raise CapacityError(
                f"The recipe asks for {count[1] * amount:g} {kind}s ({count[1]} {what}, {amount:g} each), "
                f"but the cluster has {available[kind]:g} for them.",
                f"{remedy}, or add nodes",
            )


def _check_placement(recipe: Recipe, nodes: list[dict[str, float]]) -> None:
    """A worker lives on one node: what is left over on several nodes does not add up to one."""
    scaling = recipe.scaling
    each = {"CPU": scaling.cpus_per_worker, "GPU": scaling.gpus_per_worker}
    needed = {kind: amount for kind, amount in each.items() if amount > 0}
    if not needed:
        return
    # A little tolerance, because Ray counts in ten-thousandths.
    fitting = sum(
        min(int(node.get(kind, 0.0) / amount + 1e-4) for kind, amount in needed.items()) for node in nodes
    )
    if fitting < scaling.min_workers:
        raise CapacityError(
            f"The recipe asks for {scaling.min_workers} training workers of {each['CPU']:g} CPUs and "
            f"{each['GPU']:g} GPUs each, but the cluster's nodes have room for {fitting}.",
            f"set scaling.workers={max(fitting, 1)}, or lower scaling.cpus_per_worker or "
            "scaling.gpus_per_worker",
        )


def shared_inputs(recipe: Recipe) -> dict[str, str]:
    """The local paths, by setting, that every node reads: images and weights. The rest is the driver's.

    What is not here either is left to the step that reads it, which says so.
    """
    data = recipe.data
    beside = {setting: parent(rows) for setting, rows in _rows_without_folder(recipe).items()}
    given: dict[str, str | None] = {"vision.path": recipe.vision.path, "language.path": recipe.language.path}
    if data.source == "captions":
        given["data.captions"] = data.captions
    elif data.source == "emoji":
        given["data.emoji_dir"] = data.emoji_dir
    elif data.source == "llava":
        for part in (*STAGES, "held_out"):
            given[f"data.{part}_images"] = getattr(data, f"{part}_images")
        for stage in STAGES:
            for one in getattr(data, f"{stage}_mix"):
                place = one.path if one.format == "captions" else one.images
                given[f"data.{stage}_mix {one.label}"] = place
        given |= beside
    places = {
        setting: absolute(path.removeprefix("file://"))
        for setting, path in given.items()
        if path is not None and is_local(path)
    }
    return {setting: path for setting, path in places.items() if os.path.exists(path)}


def _rows_without_folder(recipe: Recipe) -> dict[str, str]:
    """LLaVA JSON whose images have no folder of their own and are looked for beside it, by setting."""
    data = recipe.data
    if data.source != "llava":
        return {}
    rows = {
        f"data.{part}_images": getattr(data, f"{part}_json")
        for part in (*STAGES, "held_out")
        if not getattr(data, f"{part}_images")
    }
    for stage in STAGES:
        for one in getattr(data, f"{stage}_mix"):
            if one.format == "llava" and not one.images:
                rows[f"data.{stage}_mix {one.label}"] = one.path
    return {setting: file for setting, file in rows.items() if file}


def is_read(recipe: Recipe, setting: str, path: str) -> bool:
    """Whether other nodes read anything under `path`, one of `shared_inputs`.

    They do not where it is merely the folder of a file whose rows name no images in it.

    Raises:
        DataError: the file cannot be read.
    """
    rows = _rows_without_folder(recipe).get(setting)
    if rows is None:
        return True
    from rayva.data.beside import image_places

    # Without a digest: this is asked at the start of a job only, where the file is as it is.
    places = image_places(rows, setting.replace("_images", "_json"), "llava", "")
    return any(Path(folder).is_relative_to(path) for folder, _ in places)


def _describe_worker(marker: str | None, inputs: dict[str, str]) -> dict[str, Any]:
    """Runs in a worker: what it imports, and which of the marker on the storage and the inputs it sees."""
    import platform

    import rayva

    root = Path(rayva.__file__).resolve().parents[1]
    return {
        "host": socket.gethostname(),
        "root": str(root),
        "tree": tree_id(root),
        "stdlib": str(Path(platform.__file__).resolve().parent) == str(Path(os.__file__).resolve().parent),
        "marker": marker is None or os.path.exists(marker),
        "missing": {setting: path for setting, path in inputs.items() if not os.path.exists(path)},
    }


def _check_nodes(storage: Storage | None, recipe: Recipe) -> None:
    """Runs one small task on every node to see that it has this code and sees the local paths."""
    import ray
    from ray.exceptions import GetTimeoutError, RayTaskError, RuntimeEnvSetupError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    marker = f".seen-by-all-{os.getpid()}"
    shared = storage is not None and storage.is_local and len(nodes) > 1
    if storage is not None and shared:
        storage.write_bytes(marker, b"")
    inputs = shared_inputs(recipe)
    describe = ray.remote(num_cpus=0, max_retries=0)(_describe_worker)
    try:
        # A list: nodes on one machine may have the same address.
        asked = [
            (
                address,
                describe.options(
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
                ).remote(storage.path(marker) if storage is not None and shared else None, inputs),
            )
            for node_id, address in nodes.items()
        ]
        for address, reference in asked:
            try:
                answer = ray.get(reference, timeout=_START_TIMEOUT_SECONDS)
            except (RayTaskError, RuntimeEnvSetupError, GetTimeoutError) as error:
                raise RayvaError(
                    f"Node {address} cannot run the submitted code: {error}",
                    "check that the node has the packages of constraints.txt and can reach the head node",
                ) from error
            _check_answer(address, answer, storage, recipe)
    finally:
        if storage is not None and shared:
            storage.delete(marker)


def _check_answer(address: str, answer: dict[str, Any], storage: Storage | None, recipe: Recipe) -> None:
    if answer["tree"] != code_version()["tree"]:
        if answer["root"] == str(SOURCE_ROOT):
            raise RayvaError(
                f"The code in {SOURCE_ROOT} was changed while this job was running.",
                "give the same command again: finished steps are kept",
            )
        raise RayvaError(
            f"Node {address} does not run the code that was submitted: it imports {answer['root']}.",
            "uninstall rayva from the nodes, and submit with --working-dir from a clean checkout",
        )
    if not answer["stdlib"]:
        raise RayvaError(
            f"On node {address}, `import platform` is not the standard library's.",
            "remove every Python file that lies directly in platform/",
        )
    if not answer["marker"]:
        raise StorageError(
            f"Node {address} cannot see the storage {storage.root if storage else ''}.",
            "use a folder that all nodes share, or a URI such as s3://bucket/run, with --storage",
        )
    for setting, path in answer["missing"].items():
        if not is_read(recipe, setting, path):
            continue
        raise DataError(
            f"Node {address} cannot see {setting} = {path}, which is on the disk of the node that runs the "
            "job's script.",
            "put it into a folder that all nodes share, or give a URI (weights: a name on the hub)",
        )
    log.debug("node %s (%s) imports rayva from %s", address, answer["host"], answer["root"])

"""Ray on this machine: what the workers run, what the cluster has, and what a worker's failure becomes."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayva.errors import CapacityError, DataError, RecipeError, TrainingError
from rayva.orchestration.faults import user_error
from rayva.orchestration.startup import (
    _check_answer,
    check_capacity,
    is_read,
    shared_inputs,
    start_ray,
    started_here,
    stop_ray,
)
from rayva.orchestration.training import ray_environment, run_finetune
from rayva.provenance import SOURCE_ROOT, code_version
from rayva.recipes import from_dict, resolve, to_dict
from rayva.storage import Storage
from tests.training.stage_support import (
    RecordingTracker,
    context,
    finished_inputs,
    pretrained,
    tiny_recipe,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow]

RECIPE = resolve("tiny", None, ["features.decoder_cpus=0.5", "features.encoder_cpus=0.5"])

DRIVER = """
import sys, time
from rayva.orchestration.startup import start_ray
from rayva.recipes import from_dict
from rayva.storage import Storage
from tests.training.stage_support import (
    RecordingTracker,
    context,
    finished_inputs,
    pretrained,
    tiny_recipe,
)
import json
start_ray(from_dict(json.loads(sys.argv[2])), Storage(sys.argv[1]))
print("up", flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def ray_tmp() -> Iterator[Path]:
    # Short: a socket's path has room for 107 characters.
    folder = Path("/tmp") / f"rayva-core-{os.getpid()}"
    folder.mkdir()
    yield folder
    subprocess.run(["rm", "-rf", str(folder)], check=True)


@pytest.fixture(scope="module")
def local_ray(ray_tmp: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.pop("RAY_ADDRESS", None)
    os.environ["RAY_TMPDIR"] = str(ray_tmp)
    start_ray(RECIPE, Storage(str(tmp_path_factory.mktemp("storage"))))
    yield
    stop_ray()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("local_ray")
def test_a_worker_imports_this_code_and_the_stdlibs_platform() -> None:
    import ray

    @ray.remote(num_cpus=0)
    def show() -> tuple[str, str]:
        import platform

        import rayva

        return platform.__file__, rayva.__file__

    module, package = ray.get(show.remote())
    assert Path(module).parent == Path(sysconfig.get_path("stdlib"))
    assert Path(package).parents[1] == SOURCE_ROOT


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("overrides", "numbers", "remedy"),
    [
        (["scaling.workers=999", "scaling.cpus_per_worker=1"], "asks for 999 CPUs", "scaling.workers="),
        (["scaling.gpus_per_worker=1000"], "asks for 1000 GPUs", "scaling.gpus_per_worker="),
        (["features.encoders=999"], "asks for 499.5 CPUs", "features.encoders="),
        (["evaluation.gpus=1000"], "asks for 1000 GPUs", "evaluation.gpus=0"),
    ],
)
def test_asking_for_too_much_names_numbers_and_setting(
    overrides: list[str], numbers: str, remedy: str
) -> None:
    recipe = resolve("tiny", None, ["features.encoder_cpus=0.5", "features.decoder_cpus=0.5", *overrides])
    with pytest.raises(CapacityError) as caught:
        check_capacity(recipe)
    assert numbers in str(caught.value)
    assert "the cluster has" in str(caught.value)
    assert remedy in caught.value.remedy


@pytest.mark.usefixtures("local_ray")
def test_what_fits_is_accepted() -> None:
    check_capacity(RECIPE)
    check_capacity(
        RECIPE.model_copy(update={"scaling": RECIPE.scaling.model_copy(update={"cpus_per_worker": 0.0})})
    )


@pytest.mark.usefixtures("local_ray")
def test_a_workers_error_comes_out_as_it_was_raised() -> None:
    import ray

    @ray.remote(num_cpus=0, max_retries=0)
    def fail() -> None:
        raise TrainingError("the loss is not finite", "lower the learning rate")

    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        ray.get(fail.remote())
    known = user_error(caught.value, "/root")
    assert isinstance(known, TrainingError)
    assert str(known) == "the loss is not finite\n  -> lower the learning rate"


def test_what_every_node_reads_is_known_by_its_setting(tmp_path: Path) -> None:
    for name in ("images", "beside", "weights"):
        (tmp_path / name).mkdir()
    (tmp_path / "beside" / "rows.json").write_text("[]")
    mix = (
        f"[{{path: {tmp_path}/elsewhere.json, images: 'file://{tmp_path}/images', name: a}}, "
        f"{{path: {tmp_path}/beside/rows.json}}, {{path: s3://bucket/c, format: captions}}]"
    )
    settings = {
        "data.source": "llava",
        "data.pretrain_json": f"{tmp_path}/beside/rows.json",
        "data.finetune_mix": mix,
        "data.held_out_json": f"{tmp_path}/gone/rows.json",
        "language.path": f"{tmp_path}/weights",
    }
    recipe = resolve("tiny", None, [f"{key}={value}" for key, value in settings.items()])
    assert shared_inputs(recipe) == {
        "language.path": f"{tmp_path}/weights",
        "data.pretrain_images": f"{tmp_path}/beside",
        "data.finetune_mix a": f"{tmp_path}/images",
        "data.finetune_mix rows": f"{tmp_path}/beside",
    }
    assert shared_inputs(resolve("tiny")) == {}


@pytest.mark.parametrize(
    ("image", "read"),
    [(None, False), ("cat.png", True), ("sub/cat.png", True), ("/elsewhere/cat.png", False)],
)
def test_the_folder_of_a_file_of_rows_counts_only_if_they_name_images_in_it(
    tmp_path: Path, image: str | None, read: bool
) -> None:
    turns = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello."}]
    if image:
        turns[0]["value"] = "<image>\nWhat is this?"
    row = {"id": "1", "conversations": turns} | ({"image": image} if image else {})
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([row]))
    for settings in (
        [f"data.finetune_json={rows}"],
        [f"data.finetune_mix=[{{path: 'file://{rows}'}}]"],
    ):
        recipe = resolve("tiny", None, ["data.source=llava", *settings])
        [(setting, place)] = shared_inputs(recipe).items()
        assert place == str(tmp_path)
        assert is_read(recipe, setting, place) is read
        answer = {"tree": code_version()["tree"], "stdlib": True, "marker": True, "missing": {setting: place}}
        if read:
            with pytest.raises(DataError, match=r"cannot see data\.finetune"):
                _check_answer("10.0.0.1", {**answer, "root": "", "host": ""}, None, recipe)
        else:
            _check_answer("10.0.0.1", {**answer, "root": "", "host": ""}, None, recipe)


@pytest.mark.usefixtures("local_ray")
def test_preempted_nodes_are_watched_for_unless_the_cluster_is_our_own(tmp_path: Path) -> None:
    watcher = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
    assert started_here()
    assert ray_environment(RECIPE.scaling)[watcher] == "0"
    # Another process finds the same cluster of one node as somebody else's.
    import ray

    joins = DRIVER.replace(
        "time.sleep(600)",
        f"from rayva.orchestration.training import ray_environment as e; print(e(from_dict(json.loads("
        f"sys.argv[2])).scaling)[{watcher!r}])",
    )
    done = subprocess.run(
        [sys.executable, "-c", joins, str(tmp_path), RECIPE.model_dump_json()],
        env={**os.environ, "PYTHONPATH": "platform", "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["up", "1"], done.stderr


@pytest.mark.usefixtures("local_ray")
def test_a_training_workers_error_to_mend_is_told_without_a_traceback(tmp_path: Path, ray_tmp: Path) -> None:
    storage = Storage(str(tmp_path))
    inputs = finished_inputs(storage, 12) | {"pretrain": pretrained(storage)}
    settings = to_dict(tiny_recipe())
    settings["conversation"]["max_tokens"] = 16
    work = context(storage, from_dict(settings), "finetune", inputs, RecordingTracker())
    with pytest.raises(RecipeError, match=r"conversation\.max_tokens=16"):
        run_finetune(work)
    logs = [path.read_text(errors="replace") for path in ray_tmp.glob("ray/session_*/logs/worker-*.err")]
    assert logs
    assert not any("Error in training function" in text for text in logs)


def processes_with(text: str) -> list[str]:
    """Command lines of running processes that hold `text`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if text in command:
            found.append(command)
    return found


def test_a_killed_driver_takes_its_ray_along(ray_tmp: Path, tmp_path: Path) -> None:
    session = ray_tmp / "k"
    session.mkdir()
    environment = {**os.environ, "PYTHONPATH": "platform", "RAY_TMPDIR": str(session)}
    environment.pop("RAY_ADDRESS", None)
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path), RECIPE.model_dump_json()],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    assert processes_with(str(session))
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 60
    while (left := processes_with(str(session))) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []

"""The steps `pretrain` and `finetune`: both training stages under Ray Train, with one loop."""

from __future__ import annotations

import logging
import os
import threading
from typing import Any

import pyarrow.fs
import ray
import ray.train
import ray.train.torch
import torch
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from transformers.utils.logging import disable_progress_bar

from rayva.errors import RayvaError, StorageError
from rayva.lock import LockLost
from rayva.orchestration.pipeline import StepContext, StepResult
from rayva.orchestration.startup import started_here
from rayva.orchestration.train_callbacks import Mailbox, RayHooks
from rayva.progress import Progress, say
from rayva.recipes.schema import Scaling, StageName
from rayva.storage import Storage
from rayva.training.engine import PATIENCE, init_distributed
from rayva.training.loop import train
from rayva.training.stage import (
    ATTEMPTS,
    RESULT,
    StageWork,
    checkpoint_store,
    prepare,
    write_outputs,
)

_POLL_SECONDS = 1.0
_SAVING_SECONDS = 30.0
"""How long a driver that is to stop waits for the workers' last checkpoint."""
_START_SECONDS = {"fixed": "600", "elastic": "30"}
"""How long workers may take to get their places. Nodes that an autoscaler still has to start take minutes; an
elastic training counts its places anew instead: one may be on a node whose loss was not seen yet.
"""
_RAY_ENV = {
    # How soon the controller sees that a worker is gone, or that all have ended.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Workers stay where their imports work.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


def run_pretrain(ctx: StepContext) -> StepResult:
    """Stage 1: trains the projector on captions; writes projector.safetensors."""
    return _run(ctx, "pretrain")


def run_finetune(ctx: StepContext) -> StepResult:
    """Stage 2: goes on from stage 1's projector on conversations; writes the model folder `model/`."""
    return _run(ctx, "finetune")


def _run(ctx: StepContext, name: StageName) -> StepResult:
    storage, folder = ctx.storage, ctx.folder
    if not storage.exists(folder.join(RESULT)):
        work = StageWork(ctx.recipe, name, storage, folder, ctx.inputs)
        mailbox = _mailbox_beside_the_driver()
        _fit_and_tell(_trainer(work, mailbox), mailbox, ctx)
    result = storage.read_json(folder.join(RESULT))
    # Only now: an attempt that is killed before this line still finds its checkpoints or its result.
    storage.delete(folder.join(ATTEMPTS))
    return StepResult(result["outputs"], result["metrics"])


def _mailbox_beside_the_driver() -> Any:
    """Where it is lost only with the driver itself, not with a worker's node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = Mailbox.options(scheduling_strategy=here)  # type: ignore[attr-defined]  # by the decorator
    return options.remote()


def ray_environment(scaling: Scaling) -> dict[str, str]:
    """Settings of Ray Train that it reads from the environment, where a person has set no others."""
    kind = "fixed" if isinstance(scaling.workers, int) else "elastic"
    return {
        **_RAY_ENV,
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": _START_SECONDS[kind],
        # An actor that looks for nodes about to be taken away. A cluster that was started here is this
        # machine, and the driver goes with it; somebody else's may have one node now and more later.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0" if started_here() else "1",
    }


def _trainer(work: StageWork, mailbox: Any) -> TorchTrainer:
    for key, value in ray_environment(work.recipe.scaling).items():
        os.environ.setdefault(key, value)
    recipe, storage = work.recipe, work.storage
    scaling = recipe.scaling
    attempts = work.folder.join(ATTEMPTS)
    number = 1 + max((int(name.split("-")[-1]) for name in _attempt_names(work)), default=0)
    resources = {"CPU": scaling.cpus_per_worker}
    if scaling.gpus_per_worker:
        resources["GPU"] = scaling.gpus_per_worker
    filesystem = None if storage.is_local else pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(storage.fs))
    return _Trainer(
        _train_worker,
        # By reference: Ray Train's controller would unpack the work itself, and import all that training
        # needs for that, before it starts the workers, which then do the same.
        train_loop_config={"work": ray.put(work), "mailbox": mailbox},
        torch_config=TorchConfig(timeout_s=int(PATIENCE.total_seconds())),
        scaling_config=ScalingConfig(
            num_workers=scaling.workers,
            elastic_resize_monitor_interval_s=scaling.resize_seconds,
            use_gpu=scaling.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=f"attempt-{number:04d}",
            storage_path=storage.path(attempts),
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=scaling.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


class _Trainer(TorchTrainer):  # type: ignore[misc]  # ray has no types
    """Without the detached actor that frees resources when the controller alone dies.

    Here the controller ends with its job, which frees them; and the actor needs Ray's dashboard, which
    a cluster started for one run does not have: it would complain every second.
    """

    def _create_default_callbacks(self) -> list[Any]:
        made = super()._create_default_callbacks()
        return [callback for callback in made if not isinstance(callback, PlacementGroupCleanerCallback)]


def _attempt_names(work: StageWork) -> list[str]:
    names = work.storage.list(work.folder.join(ATTEMPTS))
    return [name for name in names if name.startswith("attempt-")]


def _fit_and_tell(trainer: TorchTrainer, mailbox: Any, ctx: StepContext) -> None:
    """Runs the trainer; meanwhile hands metrics to the tracker and progress to people.

    The trainer runs in a thread, so that Ctrl-C reaches this one instead of Ray Train's own handler.
    """
    failure: list[BaseException] = []
    ended = threading.Event()  # Ctrl-C during `Thread.join` would take the thread for ended

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:  # noqa: BLE001  # raised again in the main thread
            failure.append(error)
        finally:
            ended.set()

    threading.Thread(target=fit, name="trainer", daemon=True).start()
    listener = _Listener(ctx, mailbox)
    try:
        while not ended.wait(_POLL_SECONDS):
            listener.listen()
    except (KeyboardInterrupt, SystemExit) as stop:
        if listener.heard and not isinstance(stop, LockLost):
            # What was done since the last checkpoint would else be done again.
            say(f"  {ctx.folder.name}: saving what has been done; Ctrl-C again stops at once")
            ray.get(mailbox.stop.remote())
            ended.wait(_SAVING_SECONDS)
        listener.close()
        raise
    listener.close()
    error = ray.get(mailbox.error.remote())
    if error is not None:
        raise error
    if failure:
        raise failure[0]


class _Listener:
    """Empties the mailbox; a step that is done again after a worker's failure is told only once."""

    def __init__(self, ctx: StepContext, mailbox: Any) -> None:
        self._ctx, self._mailbox = ctx, mailbox
        self._last = 0
        self._progress: Progress | None = None

    @property
    def heard(self) -> bool:
        """Whether workers have told of a step."""
        return self._progress is not None

    def listen(self) -> None:
        steps, total = ray.get(self._mailbox.take.remote())
        new = [(step, metrics) for step, metrics in steps if step > self._last]
        if not new:
            return
        if self._progress is None:
            self._last = new[0][0] - 1
            if self._last:
                say(f"  {self._ctx.folder.name}: going on after step {self._last:,}")
            self._progress = Progress(self._ctx.folder.name, total, "steps", done=self._last)
        latest, metrics = new[-1]
        speed = f"{metrics['tokens_per_second']:,.0f}/s"
        self._progress.advance(latest - self._last, loss=metrics["loss"], tokens=speed)
        self._last = latest
        self._ctx.tracker.metrics_many(new)

    def close(self) -> None:
        self.listen()
        if self._progress is not None:
            self._progress.close()


def _train_worker(config: dict[str, Any]) -> None:
    """Runs on each worker. An error that only a person can mend ends the job: it is not tried again."""
    work, mailbox = ray.get(config["work"]), config["mailbox"]
    if ray.get(mailbox.error.remote()) is not None:
        return
    try:
        _train_stage(work, mailbox)
    except RayvaError as error:
        if not may_pass(error, work.storage):
            ray.get(mailbox.fail.remote(error))
            # The driver tells it in words; Ray Train would write its traceback above them.
            logging.getLogger("ray.train").setLevel(logging.CRITICAL)
        raise


def may_pass(error: RayvaError, storage: Storage) -> bool:
    """Whether Ray Train should start the workers anew: an object store may answer again."""
    return isinstance(error, StorageError) and not storage.is_local


def _train_stage(work: StageWork, mailbox: Any) -> None:
    scaling = work.recipe.scaling
    device = ray.train.torch.get_device() if scaling.gpus_per_worker else torch.device("cpu")
    torch.set_num_threads(max(1, int(scaling.cpus_per_worker)))
    # Ray Train writes every report into the root logger, and transformers a bar for every file.
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("rayva").setLevel(logging.INFO)
    disable_progress_bar()
    init_distributed(device)
    prepared = prepare(work, device)
    store = checkpoint_store(work)
    store.start()
    hooks = RayHooks(store, prepared.job.plan.steps_total, mailbox)
    result = train(prepared.job, hooks)
    hooks.close()
    write_outputs(work, prepared, result)

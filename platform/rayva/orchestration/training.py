"""The steps `pretrain` and `finetune`: both training stages under Ray Train, with one loop."""

from __future__ import annotations

import logging
import os
import resource
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import ray
import ray.train
import ray.train.torch
import torch
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from rayva.errors import RayvaError
from rayva.features.store import FeatureStore
from rayva.model.folder import (
    ConversationSettings,
    ModelSettings,
    VisionSettings,
    save_model_folder,
    save_projector,
)
from rayva.model.language import cover_vocabulary, load_language_model, load_tokenizer
from rayva.model.projector import build_projector, load_projector
from rayva.model.vlm import VisionLanguageModel
from rayva.orchestration.pipeline import StepContext, StepResult
from rayva.orchestration.train_callbacks import Mailbox, MetricsCallback, RayHooks
from rayva.progress import Progress, say
from rayva.recipes.schema import Recipe, Stage
from rayva.steps import StepFolder
from rayva.storage import Storage, storage_errors
from rayva.text.templates import get_template
from rayva.training.dataset import FeatureReader, SampleSource, StoredFeatures, TextSettings
from rayva.training.engine import init_distributed
from rayva.training.inline import InlineFeatures
from rayva.training.loop import TrainJob, TrainResult, train
from rayva.training.plan import TrainingPlan
from rayva.training.resume import FAILED
from rayva.training.store import CheckpointStore
from rayva.vision.towers import TowerDescription, describe_tower, load_tower

logger = logging.getLogger(__name__)

StageName = Literal["pretrain", "finetune"]
_ATTEMPTS = "attempts"
_SAVED = "saved"
_RESULT = "result.json"
_PROJECTOR = "projector.safetensors"
_MODEL = "model"
_POLL_SECONDS = 1.0
_RAY_ENV = {
    # How often the controller takes a report from the workers; its default of 2 s would hold them up.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Nodes that an autoscaler still has to start take minutes.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
    # Workers stay where their imports work.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


@dataclass(frozen=True)
class StageWork:
    """What a worker needs to know."""

    recipe: Recipe
    name: StageName
    storage: Storage
    folder: StepFolder
    inputs: dict[str, StepFolder]

    @property
    def stage(self) -> Stage:
        """The recipe's settings of this stage."""
        return self.recipe.pretrain if self.name == "pretrain" else self.recipe.finetune


def run_pretrain(ctx: StepContext) -> StepResult:
    """Stage 1: trains the projector on captions; writes projector.safetensors."""
    return _run(ctx, "pretrain")


def run_finetune(ctx: StepContext) -> StepResult:
    """Stage 2: goes on from stage 1's projector on conversations; writes the model folder `model/`."""
    return _run(ctx, "finetune")


def _run(ctx: StepContext, name: StageName) -> StepResult:
    storage, folder = ctx.storage, ctx.folder
    if not storage.exists(folder.join(_RESULT)):
        work = StageWork(ctx.recipe, name, storage, folder, ctx.inputs)
        mailbox = Mailbox.remote()  # type: ignore[attr-defined]  # added by the decorator
        _fit_and_tell(_trainer(work, mailbox), mailbox, ctx)
    result = storage.read_json(folder.join(_RESULT))
    # Only now: an attempt that is killed before this line still finds its checkpoints or its result.
    storage.delete(folder.join(_ATTEMPTS))
    return StepResult(result["outputs"], result["metrics"])


def _trainer(work: StageWork, mailbox: Any) -> TorchTrainer:
    for key, value in _RAY_ENV.items():
        os.environ.setdefault(key, value)
    # An actor that looks for nodes about to be taken away; where there is one node, the driver goes with it.
    several = sum(node["Alive"] for node in ray.nodes()) > 1
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1" if several else "0")
    recipe, storage = work.recipe, work.storage
    scaling = recipe.scaling
    attempts = work.folder.join(_ATTEMPTS)
    number = 1 + max((int(name.split("-")[-1]) for name in _attempt_names(work)), default=0)
    resources = {"CPU": scaling.cpus_per_worker}
    if scaling.gpus_per_worker:
        resources["GPU"] = scaling.gpus_per_worker
    filesystem = None if storage.is_local else pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(storage.fs))
    return _Trainer(
        _train_worker,
        train_loop_config={"work": work, "mailbox": mailbox},
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
            callbacks=[MetricsCallback(mailbox)],
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
    names = work.storage.list(work.folder.join(_ATTEMPTS))
    return [name for name in names if name.startswith("attempt-")]


def _store(work: StageWork) -> CheckpointStore:
    stage = work.stage
    rel = work.folder.join(_ATTEMPTS, _SAVED)
    return CheckpointStore(work.storage, rel, stage.keep_checkpoints, stage.keep_best)


def _fit_and_tell(trainer: TorchTrainer, mailbox: Any, ctx: StepContext) -> None:
    """Runs the trainer; meanwhile hands metrics to the tracker and progress to people.

    The trainer runs in a thread, so that Ctrl-C reaches this one instead of Ray Train's own handler.
    """
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:  # noqa: BLE001  # raised again in the main thread
            failure.append(error)

    thread = threading.Thread(target=fit, name="trainer", daemon=True)
    thread.start()
    listener = _Listener(ctx, mailbox)
    while thread.is_alive():
        thread.join(_POLL_SECONDS)
        listener.listen()
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
    """Runs on each worker. An error that a person can mend ends the job: it is not tried again."""
    work, mailbox = config["work"], config["mailbox"]
    if ray.get(mailbox.error.remote()) is not None:
        return
    try:
        _train_stage(work)
    except RayvaError as error:
        ray.get(mailbox.fail.remote(error))
        raise


@dataclass(frozen=True)
class _Prepared:
    """A stage ready to run, and what its output folder needs beside the weights."""

    job: TrainJob
    settings: ModelSettings
    tokenizer: PreTrainedTokenizerBase
    tower: TowerDescription


def _train_stage(work: StageWork) -> None:
    scaling = work.recipe.scaling
    device = ray.train.torch.get_device() if scaling.gpus_per_worker else torch.device("cpu")
    torch.set_num_threads(max(1, int(scaling.cpus_per_worker)))
    # Ray Train writes every report into the root logger, and transformers a bar for every file.
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("rayva").setLevel(logging.INFO)
    disable_progress_bar()
    init_distributed(device)
    prepared = _prepare(work, device)
    store = _store(work)
    store.start()
    hooks = RayHooks(store, prepared.job.plan.steps_total)
    result = train(prepared.job, hooks)
    hooks.flush()
    _write_outputs(work, prepared, result)


def _prepare(work: StageWork, device: torch.device) -> _Prepared:
    recipe, storage, stage = work.recipe, work.storage, work.stage
    language_path, revision = _pretrained(work, "language")
    tokenizer = load_tokenizer(language_path, revision)
    dtype = torch.bfloat16 if stage.precision == "bfloat16" else torch.float32
    language = load_language_model(language_path, dtype, revision)
    cover_vocabulary(language, tokenizer)
    tower = describe_tower(**_tower_arguments(work))
    settings = ModelSettings(
        vision=VisionSettings(
            kind=recipe.vision.kind,
            layer=recipe.vision.layer,
            image_size=recipe.vision.image_size,
            aspect=recipe.vision.aspect,
            tokens=tower.num_tokens,
            hidden=tower.hidden_size,
            digest=tower.digest,
        ),
        conversation=ConversationSettings(recipe.conversation.template, recipe.conversation.system),
        projector=recipe.projector.kind,
    )
    torch.manual_seed(stage.seed)
    projector = build_projector(recipe.projector.kind, tower.hidden_size, language.config.hidden_size)
    if work.name == "finetune":
        load_projector(projector, storage.localize(work.inputs["pretrain"].join(_PROJECTOR)))
    source = _source(work, tokenizer, device)
    dataset = f"{work.inputs['data'].digest}/{work.name}"
    plan = TrainingPlan(len(source), stage.batch_size, stage.epochs, stage.seed, dataset)
    model = VisionLanguageModel(language, projector)
    job = TrainJob(model, source, plan, stage, device, work.folder.digest)
    return _Prepared(job, settings, tokenizer, tower)


def _source(work: StageWork, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> SampleSource:
    conversation = work.recipe.conversation
    name = conversation.pretrain_template if work.name == "pretrain" else conversation.template
    text = TextSettings(
        template=get_template(name, tokenizer=tokenizer, system=conversation.system),
        image_position=conversation.image_position,
        max_tokens=conversation.max_tokens,
        over_length=conversation.over_length,
        seed=work.stage.seed,
    )
    samples = _table(work.storage, work.inputs["data"].join(f"{work.name}.parquet"))
    keys = _table(work.storage, work.inputs["features"].join("image_keys.parquet"))
    image_ids = keys["image_id"].combine_chunks()
    return SampleSource(samples, image_ids, _features(work, keys, device), text, tokenizer)


def _features(work: StageWork, keys: pa.Table, device: torch.device) -> FeatureReader:
    outputs = work.inputs["features"].outputs
    if work.recipe.features.mode == "inline":
        images = _table(work.storage, work.inputs["data"].join("images.parquet"))
        data = work.recipe.data
        tower = load_tower(**_tower_arguments(work), device=device)
        return InlineFeatures(images, tower, data.max_pixels, data.max_bytes)
    store = FeatureStore.open(work.storage, outputs["store"])
    by_image = dict(zip(keys["image_id"].to_pylist(), keys["key"].to_pylist(), strict=True))
    return StoredFeatures(store.read, by_image, outputs["tokens"])


def _tower_arguments(work: StageWork) -> dict[str, Any]:
    path, revision = _pretrained(work, "vision")
    vision = work.recipe.vision
    return {
        "path": path,
        "kind": vision.kind,
        "layer": vision.layer,
        "image_size": vision.image_size,
        "aspect": vision.aspect,
        "revision": revision,
    }


def _pretrained(work: StageWork, part: Literal["vision", "language"]) -> tuple[str, str | None]:
    """Path and revision of weights: a local copy where the `weights` step holds them, else what it found."""
    weights = work.inputs["weights"]
    output = weights.outputs[part]
    path, inside = output["path"], weights.join(output["path"])
    if not Path(path).is_absolute() and weights.storage.exists(inside):
        return str(weights.storage.localize(inside)), None
    return path, output["revision"]


def _table(storage: Storage, rel: str) -> pa.Table:
    with storage.open(rel) as file:
        return pq.read_table(file)


def _write_outputs(work: StageWork, prepared: _Prepared, result: TrainResult) -> None:
    """Rank 0 writes what the stage made, then result.json; the others only help to gather the weights."""
    engine, storage = result.engine, work.storage
    projector_state = engine.gather(engine.model.projector)
    language_state = engine.gather(engine.model.language) if work.name == "finetune" else None
    if engine.rank != 0 or projector_state is None:
        return
    rel = work.folder.join(_PROJECTOR if work.name == "pretrain" else _MODEL)
    with _local_target(storage, rel) as target:
        if work.name == "pretrain":
            save_projector(projector_state, target)
        elif language_state is not None:
            save_model_folder(
                target,
                language=engine.model.language,
                language_state=language_state,
                tokenizer=prepared.tokenizer,
                projector_state=projector_state,
                vision=prepared.tower.folder,
                settings=prepared.settings,
            )
    storage.write_json(work.folder.join(_RESULT), _result(prepared.job, result))


@contextmanager
def _local_target(storage: Storage, rel: str) -> Iterator[Path]:
    """A local path to write at, which ends up as `rel` of the storage; what was there before is removed."""
    storage.delete(rel)
    storage.makedirs(str(Path(rel).parent))
    if storage.is_local:
        with storage_errors(storage.uri(rel)):
            yield Path(storage.path(rel))
        return
    with tempfile.TemporaryDirectory(prefix="rayva-stage-") as scratch:
        local = Path(scratch) / Path(rel).name
        with storage_errors(str(local)):
            yield local
        storage.upload(local, rel)


def _result(job: TrainJob, result: TrainResult) -> dict[str, Any]:
    counts = dict(result.counts)
    outputs: dict[str, Any] = {
        "steps": job.plan.steps_total,
        "samples": counts.pop("samples", 0),
        "tokens": counts.pop("tokens", 0),
        "supervised_tokens": counts.pop("supervised_tokens", 0),
        "final_loss": result.final["loss"],
        "distinct_samples": len(job.source),
        "left_out": {reason: count for reason, count in job.source.left_out.items() if count},
        FAILED: counts.pop(FAILED, 0),
        # Over all epochs: truncated samples, and those dropped by reason.
        "changed": counts,
        "precision": result.precision,
        "workers": result.engine.world_size,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    figures = ("steps", "samples", "tokens", "supervised_tokens", "final_loss", "peak_memory_bytes")
    return {"outputs": outputs, "metrics": {key: float(outputs[key]) for key in figures}}

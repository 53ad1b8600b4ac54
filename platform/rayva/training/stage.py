"""A stage from the folders of finished steps to its own: what to train, and what is written at the end.

It knows nothing of what starts it: Ray Train's workers, torchrun, or one plain process.
"""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rayva.features.store import FeatureStore
from rayva.model.folder import (
    ConversationSettings,
    ModelSettings,
    VisionSettings,
    save_model_folder,
    save_projector,
)
from rayva.model.language import cover_vocabulary, load_language_model, load_tokenizer
from rayva.model.lora import merged_state, remove_adapters, save_adapter
from rayva.model.projector import build_projector, load_projector
from rayva.model.vlm import VisionLanguageModel
from rayva.recipes.schema import Recipe, Stage, StageName
from rayva.steps import StepFolder
from rayva.storage import Storage, storage_errors
from rayva.text.templates import get_template
from rayva.training.dataset import FeatureReader, SampleSource, StoredFeatures, TextSettings
from rayva.training.inline import InlineFeatures
from rayva.training.lengths import apply_limits, require_answers, require_positions
from rayva.training.loop import TrainJob, TrainResult
from rayva.training.plan import Part, TrainingPlan
from rayva.training.prefetch import VISITED, Ahead
from rayva.training.resume import FAILED
from rayva.training.store import CheckpointStore
from rayva.vision.towers import TowerDescription, describe_tower, load_tower

ATTEMPTS = "attempts"
"""What only an unfinished stage needs; gone afterwards."""
RESULT = "result.json"
"""Written last, by rank 0."""
_SAVED = "saved"
_PROJECTOR = "projector.safetensors"
_MODEL = "model"
_ADAPTER = "adapter"
"""A stage with LoRA: the adapter alone, as PEFT reads it; `model/` has it merged."""


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


def checkpoint_store(work: StageWork) -> CheckpointStore:
    """Where the stage's checkpoints are."""
    stage = work.stage
    rel = work.folder.join(ATTEMPTS, _SAVED)
    return CheckpointStore(work.storage, rel, stage.keep_checkpoints, stage.keep_best)


@dataclass(frozen=True)
class Prepared:
    """A stage ready to run, and what its output folder needs beside the weights."""

    job: TrainJob
    settings: ModelSettings
    tokenizer: PreTrainedTokenizerBase
    tower: TowerDescription


def prepare(work: StageWork, device: torch.device) -> Prepared:
    """Loads what the stage needs: weights, samples, features, plan. Called on every rank."""
    recipe, storage, stage = work.recipe, work.storage, work.stage
    language_path, revision = pretrained(work, "language")
    tokenizer = load_tokenizer(language_path, revision)
    dtype = torch.bfloat16 if stage.precision == "bfloat16" else torch.float32
    language = load_language_model(language_path, dtype, revision)
    cover_vocabulary(language, tokenizer)
    require_positions(language.config, recipe.conversation.max_tokens)
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
    source, plan = samples_and_plan(work, tokenizer, lambda keys: _features(work, keys, device), device)
    model = VisionLanguageModel(language, projector)
    ahead = Ahead(recipe.features.prefetch_steps, recipe.features.prefetch_mebibytes)
    job = TrainJob(model, source, plan, stage, device, work.folder.digest, ahead)
    return Prepared(job, settings, tokenizer, tower)


def samples_and_plan(
    work: StageWork,
    tokenizer: PreTrainedTokenizerBase,
    features: Callable[[pa.Table], FeatureReader],
    device: torch.device,
    keep_lengths: bool = True,
) -> tuple[SampleSource, TrainingPlan]:
    """What the stage trains on and when, its limits of length applied; called on every rank.

    Args:
        features: makes the reader of a table of image ids and keys.
        keep_lengths: keeps measured lengths with the unfinished stage.
    """
    stage, data = work.stage, work.recipe.data
    source = _source(work, tokenizer, features)
    kept = work.folder.join(ATTEMPTS, "lengths.npy")
    apply_limits(source, stage.lengths, work.storage, kept, device, keep_lengths)
    require_answers(source, work.name)
    digest = f"{work.inputs['data'].digest}/{work.name}"
    settings = (stage.batch_size, stage.epochs, stage.seed, digest)
    sizes = source.sizes()
    parts = [Part(one.label, sizes.get(one.label, 0), one.weight) for one in data.datasets(work.name)]
    if parts:
        return source, TrainingPlan.mixed(parts, *settings)
    return source, TrainingPlan(len(source), *settings)


def _source(
    work: StageWork, tokenizer: PreTrainedTokenizerBase, features: Callable[[pa.Table], FeatureReader]
) -> SampleSource:
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
    return SampleSource(samples, image_ids, features(keys), text, tokenizer)


def _features(work: StageWork, keys: pa.Table, device: torch.device) -> FeatureReader:
    outputs = work.inputs["features"].outputs
    if work.recipe.features.mode == "inline":
        images = _table(work.storage, work.inputs["data"].join("images.parquet"))
        data = work.recipe.data
        tower = load_tower(**_tower_arguments(work), device=device)
        batch_size = work.recipe.features.batch_size
        return InlineFeatures(images, tower, data.max_pixels, data.max_bytes, batch_size)
    store = FeatureStore.open(work.storage, outputs["store"])
    by_image = dict(zip(keys["image_id"].to_pylist(), keys["key"].to_pylist(), strict=True))
    return StoredFeatures(store.read, by_image, outputs["tokens"], work.recipe.features.read_threads)


def _tower_arguments(work: StageWork) -> dict[str, Any]:
    path, revision = pretrained(work, "vision")
    vision = work.recipe.vision
    return {
        "path": path,
        "kind": vision.kind,
        "layer": vision.layer,
        "image_size": vision.image_size,
        "aspect": vision.aspect,
        "revision": revision,
    }


def pretrained(work: StageWork, part: Literal["vision", "language"]) -> tuple[str, str | None]:
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


def write_outputs(work: StageWork, prepared: Prepared, result: TrainResult) -> None:
    """Rank 0 writes what the stage made, then result.json; the others only help to gather the weights."""
    engine, storage = result.engine, work.storage
    projector = engine.gather(engine.model.projector)
    language = engine.gather(engine.model.language) if work.name == "finetune" else None
    if engine.rank != 0 or projector is None:
        return
    if work.name == "pretrain":
        with _local_target(storage, work.folder.join(_PROJECTOR)) as target:
            save_projector(projector, target)
    elif language is not None:
        if work.stage.lora.r:
            language = _without_adapters(work, prepared, language)
        with _local_target(storage, work.folder.join(_MODEL)) as target:
            save_model_folder(
                target,
                language=prepared.job.model.language,
                language_state=language,
                tokenizer=prepared.tokenizer,
                projector_state=projector,
                vision=prepared.tower.folder,
                settings=prepared.settings,
            )
    storage.write_json(work.folder.join(RESULT), _result(prepared.job, result))


def _without_adapters(work: StageWork, prepared: Prepared, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Writes the adapter by itself; returns the language model's state with it merged."""
    lora = work.stage.lora
    language = work.recipe.language
    with _local_target(work.storage, work.folder.join(_ADAPTER)) as target:
        save_adapter(target, state, lora, language.path, language.revision)
    remove_adapters(prepared.job.model.language)
    return merged_state(state, lora)


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
    visited = {name: counts.pop(name) for name in list(counts) if name.startswith(VISITED)}
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
    if visited:
        sizes = {part.name: part.samples for part in job.plan.parts}
        outputs["datasets"] = {
            name: {"samples": samples, "visited": visited.get(VISITED + name, 0)}
            for name, samples in sizes.items()
        }
    figures = ("steps", "samples", "tokens", "supervised_tokens", "final_loss", "peak_memory_bytes")
    return {"outputs": outputs, "metrics": {key: float(outputs[key]) for key in figures}}

"""The data step: reads the recipe's source and writes it as the tables that later steps read."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from rayva.data.bundle import DatasetBundle
from rayva.data.locations import (
    absolute,
    file_system,
    is_folder,
    is_there,
    join,
    open_input,
    parent,
    reading,
    split_chain,
)
from rayva.data.quarantine import count_reasons
from rayva.data.schema import ImageRecord, Question, Rejected, Sample
from rayva.data.tables import Record, write_records
from rayva.errors import DataError
from rayva.progress import Progress
from rayva.recipes.schema import STAGES, Data, Recipe, StageName

if TYPE_CHECKING:
    from rayva.data.beside import Form
    from rayva.orchestration.pipeline import StepContext, StepResult

logger = logging.getLogger(__name__)

_INPUTS: dict[str, tuple[str, ...]] = {
    "llava": (
        "pretrain_json", "finetune_json", "held_out_json",
        "pretrain_images", "finetune_images", "held_out_images",
    ),
    "captions": ("captions",),
    "emoji": ("emoji_dir",),
}  # fmt: skip
"""The settings of each source that name files outside the storage."""
_VERSIONS = ("ETag", "etag", "md5Hash", "mtime", "created")
"""What file systems call the mark that changes with a file's content, the best first."""
_CHUNK = 1 << 20


def run(ctx: StepContext) -> StepResult:
    """Writes images, pretrain, finetune, questions and quarantine.parquet into the step's folder.

    Raises:
        DataError: a file cannot be read, or a stage is left without a single usable sample.
    """
    from rayva.orchestration.pipeline import StepResult

    bundle = load_bundle(ctx.recipe.data)
    by_dataset: dict[StageName, Counter[str]] = {stage: Counter() for stage in STAGES}
    tables: tuple[tuple[str, type[Any], Iterable[Any]], ...] = (
        ("images", ImageRecord, bundle.images),
        ("pretrain", Sample, _counted(bundle.pretrain, by_dataset["pretrain"])),
        ("finetune", Sample, _counted(bundle.finetune, by_dataset["finetune"])),
        ("questions", Question, bundle.questions),
    )
    outputs: dict[str, Any] = {}
    for name, kind, records in tables:
        outputs[name] = write_records(
            ctx.storage, ctx.folder.join(f"{name}.parquet"), kind, _shown(name, records)
        )
    quarantine = ctx.folder.join("quarantine.parquet")
    write_records(ctx.storage, quarantine, Rejected, bundle.rejected)
    outputs["quarantined"] = count_reasons(bundle.rejected)
    outputs["noted"] = dict(bundle.noted.most_common())
    if ctx.recipe.data.is_mix:
        outputs["datasets"] = {
            stage: {one.label: counts[one.label] for one in ctx.recipe.data.datasets(stage)}
            for stage, counts in by_dataset.items()
        }
    _check(ctx.recipe.data, outputs)
    metrics = {name: float(outputs[name]) for name, _, _ in tables}
    metrics["quarantined"] = float(len(bundle.rejected))
    return StepResult(outputs, metrics, [quarantine] if bundle.rejected else [])


def load_bundle(data: Data) -> DatasetBundle:
    """The source that the recipe names."""
    if data.source == "scenes":
        from rayva.instruct import scene_data

        return scene_data.build(data)
    if data.source == "emoji":
        from rayva.data import emoji

        return emoji.build(data)
    if data.is_mix:
        from rayva.data import mix
        from rayva.text.instructions import BRIEF, DETAILED

        return mix.build(data, BRIEF, DETAILED)
    if data.source == "captions":
        from rayva.data import captions
        from rayva.text.instructions import BRIEF, DETAILED

        return captions.build(data, BRIEF, DETAILED)
    from rayva.data import llava_json

    return llava_json.build(data)


def fingerprint(recipe: Recipe) -> dict[str, str]:
    """What the input outside the storage looks like, by setting: changed input reruns the step.

    Files of rows count with their content. Folders count with the names, sizes and times (or ETags)
    of their files, since reading all images on every start would take too long. So do images beside a file
    of rows, where the recipe names no folder for them. What is read in another
    way than by older code has a line of its own, so that no other finished step is lost with it.

    Raises:
        DataError: an input is missing.
    """
    data = recipe.data
    uris = {f"data.{name}": getattr(data, name) for name in _INPUTS.get(data.source, ())}
    # Rows whose images have no folder of their own in the recipe.
    alone: dict[str, Form] = {"data.captions": "captions"}
    for part in ("pretrain", "finetune", "held_out"):
        if not getattr(data, f"{part}_images"):
            alone[f"data.{part}_json"] = "llava"
    for stage in STAGES:
        for number, dataset in enumerate(getattr(data, f"{stage}_mix")):
            setting = f"data.{stage}_mix.{number}.path"
            uris[setting] = dataset.path
            uris[f"data.{stage}_mix.{number}.images"] = dataset.images
            if not dataset.images:
                alone[setting] = dataset.format
    found = {name: _digest(uri, name) for name, uri in uris.items() if uri}
    for name in found.keys() & alone.keys():
        if images := _digest_beside(uris[name], name, alone[name], found[name]):
            found[f"images of {name}"] = images
    datasets = (dataset for stage in STAGES for dataset in data.datasets(stage))
    if data.source == "captions" or any(dataset.format == "captions" for dataset in datasets):
        found["rows of captions"] = "by picture"
    captions = [name for name, form in alone.items() if form == "captions" and name in found]
    if any(_reads_csv(uris[name], name) for name in captions):
        found["rows of CSV"] = "strict"
    return dict(sorted(found.items()))


def _reads_csv(uri: str, setting: str) -> bool:
    return split_chain(uri)[0].endswith(".csv") or is_there(join(uri, "captions.csv"), setting)


def _digest(uri: str, setting: str) -> str:
    return _folder_digest(uri, setting) if is_folder(uri, setting) else _file_digest(uri, setting)


def _file_digest(uri: str, setting: str) -> str:
    digest = hashlib.sha256()
    with open_input(uri, setting) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _folder_digest(uri: str, setting: str) -> str:
    system, root = file_system(absolute(uri))
    with reading(uri, setting):
        files = system.find(root, detail=True)
    return _files_digest(files, root)


def _digest_beside(uri: str, setting: str, form: Form, content: str) -> str | None:
    """The images that a file of rows finds beside itself; None where there are none, or it is a folder."""
    if is_folder(uri, setting):
        return None
    from rayva.data.beside import image_places

    endings: dict[str, set[str]] = {}
    for folder, ending in image_places(uri, setting, form, content):
        endings.setdefault(folder, set()).add(ending)
    files: dict[str, dict[str, Any]] = {}
    for folder, wanted in endings.items():
        system, root = file_system(folder)
        with reading(folder, setting):
            if system.isdir(root):
                listed = system.ls(root, detail=True)
                files |= {one["name"]: one for one in listed if PurePosixPath(one["name"]).suffix in wanted}
    return _files_digest(files, file_system(parent(absolute(uri)))[1]) if endings else None


def _files_digest(files: dict[str, dict[str, Any]], root: str) -> str:
    digest = hashlib.sha256()
    for path, info in sorted(files.items()):
        version = next((info[key] for key in _VERSIONS if info.get(key)), "")
        line = f"{path.removeprefix(root)}\0{info.get('size')}\0{version}\n"
        digest.update(line.encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def _counted(samples: Iterable[Sample], counts: Counter[str]) -> Iterator[Sample]:
    for sample in samples:
        counts[sample.dataset] += 1
        yield sample


def _shown(name: str, records: Iterable[Record]) -> Iterator[Record]:
    with Progress(f"data: {name}", None, "rows") as progress:
        for record in records:
            progress.advance()
            yield record


def _check(data: Data, outputs: dict[str, Any]) -> None:
    reasons = ", ".join(f"{count} {reason}" for reason, count in outputs["quarantined"].items())
    if reasons:
        logger.warning("%s rows were quarantined: %s", sum(outputs["quarantined"].values()), reasons)
    for stage, datasets in outputs.get("datasets", {}).items():
        for name, samples in datasets.items():
            if not samples:
                raise DataError(
                    f"The dataset {name!r} of data.{stage}_mix gives no usable sample"
                    + (f" (quarantined: {reasons})" if reasons else ""),
                    "see quarantine.parquet in the data step's folder, and mend it or take it out of the mix",
                )
    for stage in STAGES:
        if not outputs[stage]:
            file = getattr(data, f"{stage}_json" if data.source == "llava" else "captions")
            where = f" ({file})" if file else ""
            raise DataError(
                f"The source {data.source!r}{where} gives no usable sample for {stage}"
                + (f" (quarantined: {reasons})" if reasons else ""),
                "see quarantine.parquet in the data step's folder for each row's reason, and mend the input",
            )
    if not outputs["questions"]:
        logger.warning(
            "there are no held-out questions, so the gate cannot pass: add rows that can be graded "
            "(docs/data.md, What is held out), raise data.test_fraction, or set data.held_out_json"
        )

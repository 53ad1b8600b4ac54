"""A mix and limits of length in a whole stage, and what `rayva plan` tells about it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import LlamaConfig

from rayva.cli import main
from rayva.errors import DataError, RecipeError
from rayva.orchestration.pipeline import described, make_plan
from rayva.recipes import from_dict, to_dict
from rayva.recipes.schema import Lengths
from rayva.storage import Storage
from rayva.training.audit import audit
from rayva.training.lengths import apply_limits, require_positions
from rayva.training.loop import train
from rayva.training.prefetch import Share, prepare_step
from rayva.training.stage import StageWork, prepare, write_outputs
from tests.training.stage_support import finished_inputs, tiny_recipe
from tests.training.support import VISION_HIDDEN, FolderHooks, tiny_samples, tiny_source

CPU = torch.device("cpu")
SIZES = {"a": 20, "b": 16}
LIMITS = {"min_tokens": 20, "max_answer_tokens": 20}


def _finetune(root: Path, **lengths: int) -> StageWork:
    """Stage 2 over a mix of two datasets, the second with weight 1.5, all steps before it finished."""
    elsewhere, storage = Storage(str(root / "made")), Storage(str(root / "run"))
    made = finished_inputs(elsewhere, sum(SIZES.values()))
    weights = Path(elsewhere.path(made["weights"].rel))
    (root / "a.json").write_text("[]")
    settings: dict[str, Any] = to_dict(tiny_recipe())
    settings["vision"]["path"], settings["language"]["path"] = (
        str(weights / "vision"),
        str(weights / "language"),
    )
    settings["finetune"] |= {"epochs": 2, "lengths": lengths}
    settings["data"] |= {
        "pretrain_json": str(root / "a.json"),
        "finetune_mix": [
            {"path": str(root / "a.json")},
            {"path": str(root / "a.json"), "name": "b", "weight": 1.5},
        ],
    }
    recipe = from_dict(settings)
    names = [name for name, size in SIZES.items() for _ in range(size)]
    samples = tiny_samples(len(names)).drop(["dataset"]).append_column("dataset", pa.array(names))
    pq.write_table(samples, elsewhere.path(made["data"].join("finetune.parquet")))
    shutil.copytree(elsewhere.path("features"), storage.path("features"))
    for planned in make_plan(recipe, storage):
        if planned.step.name in made:
            old = made[planned.step.name]
            shutil.copytree(elsewhere.path(old.rel), storage.path(planned.folder.rel))
            planned.folder.finish(old.outputs, {}, 0, described(recipe, planned))
    storage.write_json("recipe.json", to_dict(recipe))
    (planned,) = [one for one in make_plan(recipe, storage) if one.step.name == "finetune"]
    return StageWork(recipe, "finetune", storage, planned.folder, planned.inputs)


def _prepared(work: StageWork, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.setattr("rayva.training.stage.load_projector", lambda *_: None)  # stage 1 has not run
    return prepare(work, CPU)


@pytest.mark.usefixtures("process_group")
def test_a_stage_whose_answers_do_not_fit_is_refused_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = _finetune(tmp_path)
    settings = to_dict(work.recipe)
    settings["conversation"]["max_tokens"] = 16
    with pytest.raises(RecipeError, match=r"samples of finetune .* within conversation\.max_tokens=16"):
        _prepared(replace(work, recipe=from_dict(settings)), monkeypatch)


@pytest.mark.usefixtures("process_group")
def test_a_stage_visits_its_mix_and_tells_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = _finetune(tmp_path)
    prepared = _prepared(work, monkeypatch)
    plan = prepared.job.plan
    hooks = FolderHooks(tmp_path / "saved", stop_after=5)
    with pytest.raises(InterruptedError):
        train(prepared.job, hooks)
    again = _prepared(work, monkeypatch)
    more = FolderHooks(tmp_path / "saved")
    result = train(again.job, more)
    # 20 + 24 visits an epoch, two epochs; also over an interruption, with its steps done again.
    assert more.metrics[-1]["visited/a"] == 40
    assert more.metrics[-1]["visited/b"] == 48
    first = hooks.metrics[0]
    assert first["visited/a"] + first["visited/b"] == 8
    write_outputs(work, again, result)
    outputs = work.storage.read_json(work.folder.join("result.json"))["outputs"]
    assert outputs["datasets"] == {"a": {"samples": 20, "visited": 40}, "b": {"samples": 16, "visited": 48}}
    assert outputs["samples"] == plan.samples_total == 88
    assert not any(key.startswith("visited") for key in outputs["changed"])


def test_limits_leave_out_what_is_too_short_or_long_and_count_it(tmp_path: Path) -> None:
    storage, source = Storage(str(tmp_path)), tiny_source(60)
    lengths = np.array([source.length(index) for index in range(60)])
    low, high = np.quantile(lengths[:, 0], [0.2, 0.8]).astype(int).tolist()
    answers = np.quantile(lengths[:, 1], [0.1, 0.9]).astype(int).tolist()
    limits = Lengths(
        min_tokens=low, max_tokens=high, min_answer_tokens=answers[0], max_answer_tokens=answers[1]
    )
    kept = [
        f"s{i}" for i, (tokens, supervised) in enumerate(lengths)
        if low <= tokens <= high and answers[0] <= supervised <= answers[1]
    ]  # fmt: skip
    assert 5 < len(kept) < 55
    apply_limits(source, limits, storage, "lengths.npy", CPU)
    assert [source.sample_id(index) for index in range(len(source))] == kept
    assert source.left_out.total() == 60 - len(kept)
    assert source.left_out["too_short"] == int((lengths[:, 0] < low).sum())
    assert source.left_out["too_long"] == int((lengths[:, 0] > high).sum())
    # The same from the kept file, without encoding anything.
    again = tiny_source(60)
    again.length = None  # type: ignore[assignment]
    apply_limits(again, limits, storage, "lengths.npy", CPU)
    assert again.left_out == source.left_out
    for damaged in (b"", b"no array", storage.read_bytes("lengths.npy")[:-8]):
        storage.write_bytes("lengths.npy", damaged)
        anew = tiny_source(60)
        apply_limits(anew, limits, storage, "lengths.npy", CPU)
        assert anew.left_out == source.left_out


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"max_position_embeddings": 256}, False), ({"max_position_embeddings": 255}, True),
        ({"max_position_embeddings": 128, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, False),
    ],
)  # fmt: skip
def test_samples_are_no_longer_than_the_language_model_has_positions(
    settings: dict[str, Any], refused: bool
) -> None:
    with pytest.raises(RecipeError, match=r"conversation\.max_tokens=256") if refused else nullcontext():
        require_positions(LlamaConfig(**settings), 256)


def test_lengths_are_those_before_truncation(tmp_path: Path) -> None:
    cut = tiny_source(20, max_tokens=16)
    whole = tiny_source(20)
    assert [cut.length(i) for i in range(20)] == [whole.length(i) for i in range(20)]
    examples = [whole.example(i, 0, Counter()) for i in range(20)]
    assert [whole.length(i) for i in range(20)] == [(len(e.input_ids), e.supervised) for e in examples if e]


def test_limits_that_leave_nothing_are_an_error_with_the_counts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="30 too_short"):
        apply_limits(tiny_source(30), Lengths(min_tokens=10**6), Storage(str(tmp_path)), "l.npy", CPU)


def test_limits_leave_exactly_once_and_the_independence_of_the_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = _prepared(_finetune(tmp_path, **LIMITS), monkeypatch).job
    assert 0 < job.source.left_out.total() < 30
    assert job.plan.num_samples == len(job.source) == 36 - job.source.left_out.total()
    assert [part.samples for part in job.plan.parts] == list(job.source.sizes().values())
    assert not any(one.faults for one in audit(job.plan))
    for step in range(job.plan.steps_total):
        alone = prepare_step(step, job.plan, job.source, Share(0, 1, 8), VISION_HIDDEN)
        for world, micro in ((2, 4), (4, 1)):
            rank = prepare_step(step, job.plan, job.source, Share(1, world, micro), VISION_HIDDEN)
            assert rank.sample_ids == alone.sample_ids
            assert rank.counts == alone.counts


def _measure(rank: int, ranks: int, root: str) -> None:
    address = f"file://{root}/meet"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    source = tiny_source(31)
    apply_limits(source, Lengths(min_tokens=40), Storage(root), "lengths.npy", CPU)
    ids = [source.sample_id(index) for index in range(len(source))]
    Path(root, f"ids-{rank}.json").write_text(json.dumps(ids))
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_measure_together_what_one_measures_alone(tmp_path: Path) -> None:
    mp.spawn(_measure, (2, str(tmp_path)), nprocs=2)
    alone = tiny_source(31)
    apply_limits(alone, Lengths(min_tokens=40), Storage(str(tmp_path)), "alone.npy", CPU)
    expected = [alone.sample_id(index) for index in range(len(alone))]
    assert 0 < len(expected) < 31
    assert [json.loads((tmp_path / f"ids-{rank}.json").read_text()) for rank in range(2)] == [expected] * 2
    assert (tmp_path / "lengths.npy").read_bytes() == (tmp_path / "alone.npy").read_bytes()


def _plan(root: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(["plan", "--storage", str(root / "run"), *arguments])
    told = capsys.readouterr()
    return code, told.err if code == 2 else told.out


def test_the_command_tells_what_training_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = _finetune(tmp_path, **LIMITS)
    before = sorted(path for path in (tmp_path / "run").rglob("*"))
    code, text = _plan(tmp_path, capsys, "--audit", "--step", "2", "--json")
    assert code == 0
    assert sorted(path for path in (tmp_path / "run").rglob("*")) == before, "nothing is written"
    told = json.loads(text)
    job = _prepared(work, monkeypatch).job
    trained = prepare_step(1, job.plan, job.source, Share(0, 1, 8), VISION_HIDDEN)
    assert told["step"] == {"step": 2, "epoch": 1, "sample_ids": trained.sample_ids}
    assert told["steps"] == job.plan.steps_total
    assert told["left_out"] == {reason: n for reason, n in job.source.left_out.items() if n}
    assert [(part["name"], part["samples"]) for part in told["datasets"]] == list(job.source.sizes().items())
    assert [one["faults"] for one in told["audit"]] == [[], []]
    code, text = _plan(tmp_path, capsys, "--audit", "finetune.epochs=0.5")
    assert code == 0
    assert "dataset b: " in text
    assert "as promised" in text


def test_the_command_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _plan(tmp_path, capsys) == (
        2,
        f"error: {tmp_path}/run holds no run (no recipe.json).\n"
        "  -> give the --storage that it was started with\n",
    )
    work = _finetune(tmp_path)
    code, text = _plan(tmp_path, capsys, "--step", "99")
    assert code == 2
    assert "choose one of 1 to 12" in text
    work.inputs["features"].forget()
    code, text = _plan(tmp_path, capsys, "finetune.batch_size=3")
    assert code == 2
    assert "The step features is not finished" in text
    command = f"--config {tmp_path}/run/recipe.json --storage {tmp_path}/run --until features"
    assert text.strip().endswith(f"python pipelines/full.py {command} finetune.batch_size=3")

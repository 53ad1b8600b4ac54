"""The runner: what is finished is skipped, what changed runs again with what depends on it."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from rayva.errors import RayvaError, StorageError, TrainingError
from rayva.orchestration.faults import user_error
from rayva.orchestration.pipeline import STEPS, Step, make_plan, pick, run_job
from rayva.orchestration.summary import build_summary, record_served, summary_text
from rayva.recipes import resolve, to_dict
from rayva.steps import StepFolder, step_digest
from rayva.storage import Storage
from tests.core import job


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "run"))


def run(storage: Storage, *overrides: str, **options: Any) -> dict[str, Any]:
    recipe = resolve("tiny", None, overrides)
    lines: list[str] = []
    options = {"steps": job.STEPS, "start": job.nothing, "open_tracker": job.Tracker, **options}
    summary = run_job(recipe, storage, tell=lines.append, **options)
    return {**summary, "lines": lines}


def ran(storage: Storage) -> list[str]:
    names = storage.read_bytes("ran.txt").decode().split() if storage.exists("ran.txt") else []
    storage.delete("ran.txt")
    return names


def test_a_second_start_runs_nothing_and_needs_nothing(storage: Storage) -> None:
    first = run(storage)
    assert ran(storage) == ["data", "train", "evaluate"]

    def refuse(*_: Any) -> None:
        raise AssertionError("nothing is to be started for a finished job")

    second = run(storage, start=refuse, open_tracker=refuse)
    assert ran(storage) == []
    assert second["lines"] == ["All 3 steps are finished; there is nothing to do."]
    assert all(stage["skipped"] for stage in second["stages"].values())
    assert not any(stage["skipped"] for stage in first["stages"].values())
    for name, stage in first["stages"].items():
        assert second["stages"][name] == {**stage, "skipped": True}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("evaluation.seed=7", ["evaluate"]),
        ("finetune.lr=1e-4", ["train", "evaluate"]),
        ("data.seed=7", ["data", "train", "evaluate"]),
        ("finetune.micro_batch_size=3", []),
        ("scaling.workers=2", []),
    ],
)
def test_a_changed_setting_reruns_only_what_depends_on_it(
    storage: Storage, override: str, expected: list[str]
) -> None:
    run(storage)
    ran(storage)
    lines = run(storage, override)["lines"]
    assert ran(storage) == expected
    if expected:
        key, _, value = override.partition("=")
        assert any(f"changed: {key} " in line and f"-> {float(value):g}" in line for line in lines)
    run(storage)
    assert ran(storage) == [], "the first settings' folders are still there"


def test_the_recipe_that_was_given_last_is_kept_also_with_nothing_to_do(storage: Storage) -> None:
    for overrides in ([], ["data.seed=7"], [], ["serving.port=9555"]):
        run(storage, *overrides)
        assert storage.read_json("recipe.json") == to_dict(resolve("tiny", None, overrides))


def test_a_moved_run_tells_of_its_store_where_it_is_now(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "INFO", {**job.INFO, "tracking_uri": f"sqlite:///{storage.root}/mlflow.db"})
    run(storage)
    moved = Storage(str(tmp_path / "moved"))
    Path(storage.root).rename(moved.root)
    summary = run(moved)
    assert ran(moved) == ["data", "train", "evaluate"]  # from before
    assert summary["mlflow"]["tracking_uri"] == f"sqlite:///{moved.root}/mlflow.db"
    assert all(stage["skipped"] for stage in summary["stages"].values())


def test_what_changed_is_told_without_secrets(storage: Storage) -> None:
    step = Step("data", "makes data", (), pick("tracking"), "tests.core.job:data")
    old = {"tracking.uri": "http://me:hunter2@host:5000", "version": 1}
    before = StepFolder(storage, "data", step_digest("data", old, {}))
    before.finish({}, {}, 1.0, {"settings": old, "inputs": {}})
    (planned,) = make_plan(resolve("tiny", None, ["tracking.uri=http://host:5000"]), storage, (step,))
    assert "tracking.uri 'http://***@host:5000' -> 'http://host:5000'" in planned.why


def test_changed_input_files_rerun_all(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    run(storage)
    ran(storage)
    monkeypatch.setenv("FINGERPRINT", "other")
    run(storage)
    assert ran(storage) == ["data", "train", "evaluate"]


def test_a_failed_step_goes_on_where_it_stopped(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(ctx: Any) -> None:
        ctx.storage.write_json(ctx.folder.join("count.json"), 3)
        raise TrainingError("the loss is not finite", "lower finetune.lr")

    tracker = job.Tracker()
    with monkeypatch.context() as patch:
        patch.setattr(job, "train", broken)
        with pytest.raises(TrainingError, match="not finite"):
            run(storage, open_tracker=lambda *_: tracker)
    assert tracker.log[-1] == ("close", "FAILED")
    plan = {planned.step.name: planned for planned in make_plan(resolve("tiny"), storage, job.STEPS)}
    assert plan["data"].manifest is not None
    assert plan["train"].manifest is None
    assert "was interrupted" in plan["train"].why
    before = plan["train"].folder.attempts()
    ran(storage)
    summary = run(storage)
    assert ran(storage) == ["train", "evaluate"]
    assert plan["train"].folder.outputs == {"count": 5}
    assert summary["stages"]["train"]["seconds"] >= round(sum(before), 2), "earlier attempts count"
    assert len(plan["train"].folder.attempts()) == 2


def test_until_and_only(storage: Storage) -> None:
    summary = run(storage, until="train")
    assert ran(storage) == ["data", "train"]
    assert list(summary["stages"]) == ["data", "train"]
    assert summary["grounding"] is None
    run(storage, only="evaluate")
    assert ran(storage) == ["evaluate"]
    with pytest.raises(RayvaError, match="no step 'tran'"):
        run(storage, until="tran")


def test_only_leaves_out_what_the_step_does_not_need(storage: Storage) -> None:
    side = Step("side", "stands apart", (), pick("name"), "tests.core.job:evaluate")
    run(storage, only="evaluate", steps=(side, *job.STEPS))
    assert ran(storage) == ["data", "train", "evaluate"]


def test_force_forgets_a_step_and_its_dependents(storage: Storage) -> None:
    run(storage)
    ran(storage)
    run(storage, force=["train"])
    assert ran(storage) == ["train", "evaluate"]
    with pytest.raises(RayvaError, match="no step 'tran'"):
        run(storage, force=["tran"])


def test_the_summary_says_what_was_made(storage: Storage) -> None:
    summary = run(storage)
    summary.pop("lines")
    assert summary == storage.read_json("summary.json")
    assert summary["recipe"] == "tiny"
    assert summary["commit"]
    assert summary["grounding"]["accuracy"] == 0.9
    assert summary["gate"] == {"passed": True, "why": "because"}
    assert summary["mlflow"] == job.INFO
    for name, stage in summary["stages"].items():
        assert Path(stage["folder"]).name == f"{name}-{stage['digest'][:12]}"
        assert (Path(stage["folder"]) / "manifest.json").exists()
    text = summary_text(summary, storage)
    assert "90.0%" in text
    assert "mlflow ui --backend-store-uri sqlite:///x" in text
    assert str(storage.root) in text


def test_the_summary_tells_the_visits_of_a_mix(storage: Storage) -> None:
    recipe = resolve("tiny")
    assert build_summary(recipe, storage, {}, set())["datasets"] == {}
    counts = {"science": {"samples": 6000, "visited": 12000}}
    folder = StepFolder(storage, "finetune", "0" * 64)
    folder.finish({"datasets": counts}, {}, 1.0, {"mlflow": None, "code": {"commit": "abc"}})
    summary = build_summary(recipe, storage, {"finetune": (folder, folder.manifest())}, set())
    assert summary["datasets"] == {"finetune": counts}
    told = "finetune, dataset science: 6,000 samples visited 12,000 times"
    assert told in summary_text(summary, storage)


def test_the_summary_tells_what_was_not_used_or_changed(storage: Storage) -> None:
    recipe = resolve("tiny")
    assert build_summary(recipe, storage, {}, set())["samples"] == {}
    made = {
        "data": {"quarantined": {"missing_image": 3, "bad_json": 1}, "images": 9,
                 "noted": {"image_mark_without_image": 7}},
        "features": {"quarantined": {}},
        "finetune": {"samples": 90, "distinct_samples": 30, "left_out": {"image_quarantined": 2},
                     "changed": {"truncated": 1200, "dropped_unknown_role": 3}},
    }  # fmt: skip
    steps = {}
    for name, outputs in made.items():
        folder = StepFolder(storage, name, "0" * 64)
        folder.finish(outputs, {}, 1.0, {"mlflow": None, "code": {"commit": "abc"}})
        steps[name] = (folder, folder.manifest())
    summary = build_summary(recipe, storage, steps, set())
    assert summary["samples"] == {
        "data": {
            "quarantined": {"missing_image": 3, "bad_json": 1},
            "noted": {"image_mark_without_image": 7},
        },
        "features": {"quarantined": {}},
        "finetune": made["finetune"],
    }
    text = summary_text(summary, storage)
    assert "data: 4 quarantined (3 missing_image, 1 bad_json)" in text
    assert "data: 7 used, but perhaps not as meant (7 image_mark_without_image)" in text
    assert "finetune: 2 left out (2 image_quarantined)" in text
    assert "finetune: 1,203 changed, over all epochs (1,200 truncated, 3 dropped_unknown_role)" in text
    assert "features:" not in text


def test_served_answers_stay_as_long_as_the_export_is_the_same(storage: Storage) -> None:
    export = Step("export", "exports", ("train",), pick(), "tests.core.job:evaluate")
    steps = (*job.STEPS, export)
    run(storage, steps=steps)
    answers = [{"question": "q", "answer": "a"}]
    record_served(storage, "picture.png", answers)
    again = run(storage, steps=steps)
    assert again["served"] == {"picture": "picture.png", "answers": answers}
    assert run(storage, "evaluation.seed=3", steps=steps)["served"] == again["served"]
    assert run(storage, "finetune.lr=3e-3", steps=steps)["served"] is None


def test_another_programs_summary_does_not_stop_a_job(storage: Storage) -> None:
    storage.write_bytes("summary.json", b"[]")
    export = Step("export", "exports", ("train",), pick(), "tests.core.job:evaluate")
    assert run(storage, steps=(*job.STEPS, export))["served"] is None
    assert storage.read_json("summary.json")["recipe"] == "tiny"


def test_the_tracker_gets_metrics_and_artifacts(storage: Storage) -> None:
    tracker = job.Tracker()
    run(storage, until="data", open_tracker=lambda *_: tracker)
    kinds = [kind for kind, _ in tracker.log]
    assert kinds == ["step", "metrics", "artifact", "close"]
    assert tracker.log[1] == ("metrics", {"images": 3.0})
    assert tracker.log[-1] == ("close", "FINISHED")


def test_the_manifest_records_settings_inputs_and_code(storage: Storage) -> None:
    run(storage, until="train")
    data, train, _ = make_plan(resolve("tiny"), storage, job.STEPS)
    assert train.manifest is not None
    assert train.manifest["inputs"] == {"data": data.folder.digest}
    assert train.manifest["settings"]["finetune.lr"] == resolve("tiny").finetune.lr
    assert set(train.manifest["code"]) == {"commit", "dirty", "tree"}


def test_a_foreign_manifest_is_refused(storage: Storage) -> None:
    folder = StepFolder(storage, "data", "a" * 64)
    storage.write_json(folder.join("manifest.json"), {"digest": "a" * 12 + "b" * 52})
    with pytest.raises(StorageError, match="another run"):
        folder.manifest()


def test_digests_tell_steps_settings_and_inputs_apart() -> None:
    base = step_digest("a", {"x": 1, "y": 2}, {"i": "0"})
    assert base == step_digest("a", {"y": 2, "x": 1}, {"i": "0"})
    others = [
        step_digest("b", {"x": 1, "y": 2}, {"i": "0"}),
        step_digest("a", {"x": 1, "y": 3}, {"i": "0"}),
        step_digest("a", {"x": 1, "y": 2}, {"i": "1"}),
    ]
    assert len({base, *others}) == 4


def test_the_real_steps_are_in_order_and_read_known_settings() -> None:
    seen: set[str] = set()
    for step in STEPS:
        assert set(step.needs) <= seen, f"{step.name} comes before what it needs"
        seen.add(step.name)
        json.dumps(step.settings(resolve("tiny")))
    settings = {step.name: step.settings(resolve("tiny")) for step in STEPS}
    assert "finetune.lr" in settings["finetune"]
    assert "finetune.lr" not in settings["pretrain"]
    assert "finetune.micro_batch_size" not in settings["finetune"]
    assert "vision.layer" not in settings["weights"]
    assert settings["export"] == {}


class WorkerGroupError(Exception):
    """Shaped like Ray Train's: one exception a rank."""

    def __init__(self, failures: dict[int, Exception]) -> None:
        super().__init__("training failed")
        self.worker_failures = failures


def test_the_error_behind_a_failed_worker_comes_out() -> None:
    behind = TrainingError("the loss is not finite")
    found = user_error(WorkerGroupError({0: ValueError("x"), 1: behind}), "/root")
    assert found is behind
    full = user_error(WorkerGroupError({0: OSError(errno.ENOSPC, "no space", "/root/x")}), "/root")
    assert isinstance(full, StorageError)
    assert "/root/x" in str(full)
    assert user_error(WorkerGroupError({0: ValueError("a defect")}), "/root") is None


def test_a_remote_storages_failure_in_ray_itself_comes_out() -> None:
    client = pytest.importorskip("botocore.exceptions")
    behind = client.EndpointConnectionError(endpoint_url="http://minio:9000")
    found = user_error(WorkerGroupError({0: behind}), "s3://bucket/run")
    assert isinstance(found, StorageError)
    assert found.what.startswith("s3://bucket/run cannot be used: Could not connect")
    assert "minio:9000" in found.what
    assert user_error(WorkerGroupError({0: behind}), "/root") is None, "not about a local storage"
    assert user_error(WorkerGroupError({0: OSError("a defect")}), "s3://bucket/run") is None


def test_a_defect_keeps_its_traceback(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(ctx: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(job, "data", broken)
    with pytest.raises(ZeroDivisionError):
        run(storage)


def test_a_full_disk_in_a_step_is_told(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(ctx: Any) -> None:
        raise RuntimeError("a library's own") from OSError(errno.ENOSPC, "no space", "/some/file")

    monkeypatch.setattr(job, "data", full)
    with pytest.raises(StorageError, match=r"No space is left to write /some/file"):
        run(storage)

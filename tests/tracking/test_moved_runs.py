"""The registry and runs that are copied, moved, deleted or gone back to."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from rayva.errors import ServingError
from rayva.orchestration.pipeline import Step, StepContext, StepResult, pick, run_job
from rayva.recipes import resolve
from rayva.serving.source import find_model
from rayva.storage import Storage

pytestmark = pytest.mark.slow


def train(ctx: StepContext) -> StepResult:
    ctx.storage.write_bytes(ctx.folder.join("model", "rayva.json"), str(ctx.recipe.data.seed).encode())
    return StepResult({})


def register(ctx: StepContext) -> StepResult:
    model = ctx.storage.uri(ctx.inputs["finetune"].join("model"))
    tags = {"rayva.digest": str(ctx.recipe.data.seed)}
    made = ctx.tracker.register_model("m", model, tags, {}, champion=False)
    return StepResult({"model_name": "m", "version": made.version, "aliases": list(made.aliases)})


HERE = "tests.tracking.test_moved_runs"
STEPS = (
    Step("finetune", "trains", (), pick("data"), f"{HERE}:train"),
    Step("register", "registers", ("finetune",), pick("tracking"), f"{HERE}:register"),
)


def run(folder: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    lines: list[str] = []
    summary = run_job(
        resolve("tiny", None, overrides), Storage(str(folder)), steps=STEPS, start=lambda *_: None,
        tell=lines.append, **options,
    )  # fmt: skip
    return {**summary["model"], "lines": lines}


def test_the_same_model_in_another_folder_is_a_version_of_its_own(tmp_path: Path) -> None:
    shared = f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    first, second = tmp_path / "a", tmp_path / "b"
    assert run(first, shared)["version"] == "1"
    assert run(first, shared, force=["register"])["version"] == "1"
    assert run(second, shared)["version"] == "2"
    shutil.rmtree(first)
    assert Path(find_model(str(second)).folder).is_relative_to(second)
    assert run(second, shared, force=["register"])["version"] == "2"


def test_a_copy_is_served_from_itself_when_the_first_is_gone(tmp_path: Path) -> None:
    shared = f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    run(tmp_path / "a", shared)
    (tmp_path / "a").rename(tmp_path / "b")
    assert Path(find_model(str(tmp_path / "b")).folder).is_relative_to(tmp_path / "b")
    with pytest.raises(ServingError, match=r"--storage .* --force register"):
        find_model("models:/m@candidate", shared.partition("=")[2])
    assert run(tmp_path / "b", shared, force=["register"])["version"] == "2"
    found = find_model("models:/m@candidate", shared.partition("=")[2])
    assert Path(found.folder).is_relative_to(tmp_path / "b")


@pytest.mark.parametrize("again", [False, True])
def test_a_moved_run_is_served_from_where_it_is_now(again: bool, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    run(old)
    old.rename(new)
    if again:
        assert "nothing to do" in run(new)["lines"][0]
    source = find_model(str(new))
    assert Path(source.folder).is_relative_to(new)
    assert source.name == "m"
    assert not old.exists()


def test_aliases_are_told_as_they_are_when_settings_are_gone_back_to(tmp_path: Path) -> None:
    assert run(tmp_path)["aliases"] == ["candidate"]
    assert run(tmp_path, "data.seed=7")["aliases"] == ["candidate"]
    first = run(tmp_path)
    assert (first["version"], first["aliases"]) == ("1", [])
    assert "nothing to do" in first["lines"][0]
    (tmp_path / "mlflow.db").unlink()
    gone = run(tmp_path)
    assert "may have gone to a model that was registered later" in gone["lines"][-1]

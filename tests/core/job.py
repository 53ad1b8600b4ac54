"""A small job for the tests of the runner, also run as a script: `job.py ARGUMENTS`.

Three steps that each append their name to `ran.txt`; `train` counts to five and keeps its count, so that
it can be interrupted and go on.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from rayva.orchestration.pipeline import Step, StepContext, StepResult, pick
from rayva.steps import StepFolder

INFO = {"run_id": "r1", "experiment": "e", "tracking_uri": "sqlite:///x"}


class Tracker:
    """Takes what the runner hands over, and keeps it."""

    def __init__(self, *_: Any) -> None:
        self.log: list[tuple[str, Any]] = []

    @contextlib.contextmanager
    def step(self, name: str, folder: StepFolder, inputs: dict[str, StepFolder]) -> Iterator[None]:
        self.log.append(("step", name))
        yield

    def metrics(self, values: dict[str, float]) -> None:
        self.log.append(("metrics", values))

    def input(self, name: str, digest: str, uri: str, context: str) -> None:
        self.log.append(("input", (name, digest, uri, context)))

    def artifact(self, path: str) -> None:
        self.log.append(("artifact", path))

    def close(self, status: str) -> None:
        self.log.append(("close", status))

    def info(self) -> dict[str, str]:
        return INFO


def note(ctx: StepContext) -> None:
    path = ctx.storage.path("ran.txt")
    with open(path, "a") as file:
        file.write(ctx.folder.name + "\n")


def data(ctx: StepContext) -> StepResult:
    note(ctx)
    return StepResult({"images": 3}, {"images": 3.0}, ["ran.txt"])


def train(ctx: StepContext) -> StepResult:
    note(ctx)
    assert ctx.inputs["data"].outputs == {"images": 3}
    place = ctx.folder.join("count.json")
    count = ctx.storage.read_json(place) if ctx.storage.exists(place) else 0
    while count < 5:
        count += 1
        ctx.storage.write_json(place, count)
        if os.environ.get("PAUSE"):
            time.sleep(float(os.environ["PAUSE"]))
    return StepResult({"count": count})


def evaluate(ctx: StepContext) -> StepResult:
    note(ctx)
    grounding = {"accuracy": 0.9, "accuracy_shuffled_images": 0.4, "accuracy_no_image": 0.3, "questions": 10}
    return StepResult({"grounding": grounding, "passed": True, "why": "because"})


def fingerprint(recipe: Any) -> dict[str, Any]:
    return {"file": os.environ.get("FINGERPRINT", "same")}


HERE = "tests.core.job" if __name__ != "__main__" else "__main__"
STEPS = (
    Step("data", "makes data", (), pick("data"), f"{HERE}:data", f"{HERE}:fingerprint"),
    Step("train", "trains", ("data",), pick("finetune.lr", "finetune.epochs"), f"{HERE}:train"),
    Step("evaluate", "evaluates", ("train",), pick("evaluation.seed"), f"{HERE}:evaluate"),
)


def nothing(*_: Any) -> None:
    """In place of Ray's start."""


if __name__ == "__main__":
    from rayva.orchestration.entry import main

    raise SystemExit(main(steps=STEPS, start=nothing, open_tracker=Tracker, argv=sys.argv[1:]))

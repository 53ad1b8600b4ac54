"""What a stage trains, what it keeps, how it goes on, and when it stops."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rayva.errors import TrainingError
from rayva.recipes.schema import Lora
from rayva.training.checkpoint import FORMAT, DamagedCheckpointError, read_progress, verify
from rayva.training.loop import train
from tests.training.support import FolderHooks, TinyFeatures, state_bytes, tiny_job, tiny_model

pytestmark = pytest.mark.usefixtures("process_group")


LORA = Lora(r=4, dropout=0.1)


def _train(root: Path, **settings: Any) -> tuple[FolderHooks, dict[str, bytes]]:
    hooks = FolderHooks(root)
    result = train(tiny_job(**settings), hooks)
    weights = state_bytes(result.engine.model)
    result.engine.close()
    return hooks, weights


def _interrupt(root: Path, after: int, **settings: Any) -> None:
    with pytest.raises(InterruptedError):
        train(tiny_job(**settings), FolderHooks(root, stop_after=after))


@pytest.mark.parametrize(
    "settings",
    [{}, {"train": "projector"}, {"zero": 2}, {"precision": "bfloat16"}, {"lora": LORA}],
    ids=["all", "projector", "zero2", "bf16", "lora"],
)
def test_an_interrupted_training_goes_on_bit_by_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    whole, expected = _train(tmp_path / "whole", epochs=2.0, **settings)
    _interrupt(tmp_path / "killed", 5, epochs=2.0, **settings)
    rest, weights = _train(tmp_path / "killed", epochs=2.0, **settings)
    assert weights == expected
    assert len(rest.metrics) == len(whole.metrics) - 3
    assert [m["loss"] for m in rest.metrics] == [m["loss"] for m in whole.metrics[3:]]


def test_counts_add_up_over_interruptions(tmp_path: Path) -> None:
    whole = train(tiny_job(), FolderHooks(tmp_path / "whole"))
    _interrupt(tmp_path / "killed", 3 + 1)
    resumed = train(tiny_job(), FolderHooks(tmp_path / "killed"))
    assert resumed.counts == whole.counts
    assert whole.counts["samples"] == 30


@pytest.mark.parametrize("zero", [0, 2])
def test_lora_trains_and_keeps_adapters_and_projector_alone(zero: int, tmp_path: Path) -> None:
    before = state_bytes(tiny_model())
    hooks = FolderHooks(tmp_path)
    result = train(tiny_job(lora=Lora(r=2), zero=zero), hooks)
    after = {name.replace(".base_layer.", "."): b for name, b in state_bytes(result.engine.model).items()}
    assert {name for name in before if before[name] != after[name]} == {"projector.weight", "projector.bias"}
    states = torch.load(
        hooks.root / "checkpoint-00000003" / "engine" / "mp_rank_00_model_states.pt", weights_only=False
    )
    assert all("lora_" in name or name.startswith("projector.") for name in states["module"])
    moments = result.engine._optimizer.state
    trained = sum(p.numel() for p in result.engine.model.parameters() if p.requires_grad)
    kept = sum(s["exp_avg"].numel() for s in moments.values())
    assert trained <= kept < trained + 64  # ZeRO pads its partitions
    result.engine.close()


def test_stage_1_trains_and_keeps_the_projector_alone(tmp_path: Path) -> None:
    before = state_bytes(tiny_model())
    hooks, after = _train(tmp_path, train="projector")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"projector.weight", "projector.bias"}
    checkpoint = hooks.checkpoints()[0]
    with checkpoint.open() as folder:
        states = torch.load(folder / "engine" / "mp_rank_00_model_states.pt", weights_only=False)
        assert set(states["module"]) == {"projector.weight", "projector.bias"}


@pytest.mark.parametrize("settings", [{"zero": 0}, {"zero": 2}, {"precision": "bfloat16"}, {"zero": 3}])
def test_a_frozen_language_model_takes_no_gradient_and_no_optimizer_state(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    result = train(tiny_job(train="projector", **settings), FolderHooks(tmp_path))
    assert all(parameter.grad is None for parameter in result.engine.model.language.parameters())
    own = sum(parameter.numel() for parameter in tiny_model().projector.parameters())
    kept = sum(s["exp_avg"].numel() for s in result.engine._optimizer.state.values())
    assert own <= kept < own + 64
    result.engine.close()


def test_embeddings_have_a_learning_rate_of_their_own(tmp_path: Path) -> None:
    before = tiny_model().state_dict()
    after = train(tiny_job(lr=1e-12, embedding_lr=1e-2), FolderHooks(tmp_path)).engine.model.state_dict()
    changed = {name for name in before if not torch.allclose(before[name], after[name], atol=1e-6)}
    assert changed == {"language.model.embed_tokens.weight", "language.lm_head.weight"}  # they are tied


@pytest.mark.parametrize("damage", ["change", "cut", "remove", "add", "no manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, expected = _train(tmp_path / "whole", epochs=2.0)
    _interrupt(tmp_path / "killed", 7, epochs=2.0)
    newest = tmp_path / "killed" / "checkpoint-00000006"
    victim = newest / "engine" / "mp_rank_00_model_states.pt"
    if damage == "change":
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    elif damage == "cut":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif damage == "remove":
        victim.unlink()
    elif damage == "add":
        victim = newest / "engine" / "extra.pt"
        victim.write_bytes(b"not ours")
    else:
        victim = newest / "manifest-00000.json"
        victim.unlink()
    with pytest.raises(DamagedCheckpointError, match=victim.name):
        verify(newest)
    hooks, weights = _train(tmp_path / "killed", epochs=2.0)
    assert len(hooks.metrics) == 8 - 3
    assert weights == expected
    assert any("checkpoint-00000006 is passed over" in message for message in caplog.messages)


_DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("manifest-00000.json", '{"files": null}', "lists no files"),
        ("manifest-00000.json", '{"files": ["progress.json"]}', "lists no files"),
        ("manifest-00000.json", '{"files": {"progress.json": "x"}}', "lists no files"),
        ("manifest-00000.json", _DEEP, "cannot be read"),
        ("manifest-00000.json", '{"files": {"progress.json": {}}}', "is not what was written"),
        (
            "manifest-00000.json",
            json.dumps({"format": FORMAT, "rank": 0, "files": {"x" * 300: {}}}, indent=1) + "\n",
            "cannot be read",
        ),
        ("progress.json", {"world_size": "1"}, "world_size"),
        ("progress.json", {"world_size": 0}, "world_size"),
        ("progress.json", {"step": None}, "step"),
        ("progress.json", {"counts": [1]}, "counts"),
        ("progress.json", {"loss": "x"}, "loss"),
        ("progress.json", {"more": 1}, "more"),
    ],
)
def test_damaged_json_of_a_checkpoint_is_named_and_the_one_before_taken(
    file: str, content: str | dict[str, Any], told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _interrupt(tmp_path, 7, epochs=2.0)
    victim = tmp_path / "checkpoint-00000006" / file
    if isinstance(content, dict):
        content = json.dumps(json.loads(victim.read_text()) | content)
    victim.write_text(content)
    hooks, _ = _train(tmp_path, epochs=2.0)
    assert len(hooks.metrics) == 8 - 3
    (message,) = [message for message in caplog.messages if "is passed over" in message]
    assert file in message or told == "cannot be read"
    assert told in message


def test_a_stage_without_a_sound_checkpoint_begins_anew_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _interrupt(tmp_path, 4)
    checkpoints = list(tmp_path.glob("checkpoint-*"))
    for checkpoint in checkpoints:
        (checkpoint / "engine" / "mp_rank_00_model_states.pt").unlink()
    assert len(_train(tmp_path)[0].metrics) == 4
    assert f"none of the {len(checkpoints)} checkpoints is sound: the stage begins anew" in caplog.messages


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    _interrupt(tmp_path, 4)
    assert read_progress(tmp_path / "checkpoint-00000003").step == 3
    with pytest.raises(TrainingError, match="other settings"):
        train(replace(tiny_job(), digest="another"), FolderHooks(tmp_path))
    with pytest.raises(TrainingError, match="bfloat16"):
        train(tiny_job(precision="bfloat16"), FolderHooks(tmp_path))


@pytest.mark.parametrize("native", [True, False])
def test_auto_precision_goes_on_in_that_of_the_checkpoint(
    native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started again on machines of another kind, or with one of them among the workers."""

    def machine(does: bool) -> None:
        monkeypatch.setattr("rayva.training.precision._native_bf16", lambda _: (does, "the test says so"))

    machine(native)
    _, expected = _train(tmp_path / "whole", epochs=2.0, precision="auto")
    _interrupt(tmp_path / "killed", 7, epochs=2.0, precision="auto")
    machine(not native)
    hooks, weights = _train(tmp_path / "killed", epochs=2.0, precision="auto")
    assert len(hooks.metrics) == 8 - 6
    assert weights == expected


class _NotANumber(TinyFeatures):
    def _one(self, number: int) -> Tensor:
        features = super()._one(number)
        return features * math.nan if number == 3 else features


def test_a_loss_that_is_not_finite_stops_and_names_the_samples(tmp_path: Path) -> None:
    job = tiny_job()
    job.source._features = _NotANumber()
    before = state_bytes(job.model)
    with pytest.raises(TrainingError, match=r"loss is nan in step 0.*s\d+, s\d+"):
        train(job, FolderHooks(tmp_path))
    assert state_bytes(job.model) == before


def test_metrics_are_those_of_the_plan(tmp_path: Path) -> None:
    hooks, _ = _train(tmp_path, epochs=2.0, lr=1e-2)
    assert [m["lr"] for m in hooks.metrics][:2] == [0.0, 1e-2]
    assert not {"projector_lr", "embedding_lr"} & hooks.metrics[0].keys()
    assert hooks.metrics[-1]["epoch"] == 2.0
    for metrics in hooks.metrics:
        assert 0 <= metrics["padding_share"] < 1
        assert 0 <= metrics["wait_share"] <= 1
        assert metrics["grad_norm"] > 0
        assert metrics["supervised_tokens"] > 0


def test_projector_learning_rate_of_its_own(tmp_path: Path) -> None:
    before = tiny_model().state_dict()
    after = train(tiny_job(lr=1e-12, projector_lr=1e-2), FolderHooks(tmp_path)).engine.model.state_dict()
    changed = {name for name in before if not torch.allclose(before[name], after[name], atol=1e-6)}
    assert changed == {"projector.weight", "projector.bias"}

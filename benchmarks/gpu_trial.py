"""One trial of `gpu_step.py`: a model with random weights, packed batches, timed training steps.

Shapes: B rows, T positions of a row, A heads, D head size, N samples in a batch.
"""

from __future__ import annotations

import random
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import bench_support  # puts platform/ on the path
import torch
from gpu_shapes import SHAPES, Shape
from lengths import StageName, describe_lengths, quantile_lengths
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from rayva.model.attention import isolate_samples
from rayva.model.batch import Batch, Row, collate_flat, collate_packed
from rayva.model.compiling import compile_layers
from rayva.model.freeze import apply_freeze_policy
from rayva.model.projector import build_projector
from rayva.model.vlm import VisionLanguageModel
from rayva.text.special import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from rayva.training.plan import pack

_DTYPE = torch.bfloat16
_SUPERVISED = {"pretrain": 1.0, "finetune": 0.7}
"""Share of a sample's text that is supervised: captions whole, answers of conversations."""
_DIFFERENT_BATCHES = 4
_CHUNK_ELEMENTS = 2**28
"""Parameters that are updated at once: their gradients are copied to fp32."""


def describe(work: dict[str, Any]) -> dict[str, Any]:
    """Name and memory of the device, what a large bf16 matrix product reaches, and images/s of the tower."""
    if work["device"] == "cpu":
        return {"name": "CPU", "memory": 0, "matmul_tflops": 0.0, "torch": torch.__version__} | _encode(work)
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; --device cpu --shape tiny only tests the code")
    properties = torch.cuda.get_device_properties(0)
    common = {"name": properties.name, "memory": torch.cuda.mem_get_info()[0], "torch": torch.__version__}
    return common | {"matmul_tflops": _matmul_tflops()} | _encode(work)


def _matmul_tflops(size: int = 8192, repeats: int = 20) -> float:
    left = torch.randn(size, size, device="cuda", dtype=_DTYPE)
    right = torch.randn(size, size, device="cuda", dtype=_DTYPE)
    for _ in range(3):
        left @ right
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        left @ right
    torch.cuda.synchronize()
    return 2 * size**3 * repeats / (time.perf_counter() - started) / 1e12


def _encode(work: dict[str, Any]) -> dict[str, float]:
    """Images a second through the vision tower, forward only."""
    tiny, device = work["shape"] == "tiny", work["device"]
    shape = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    }
    if tiny:
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    side, batch = (56, 4) if tiny else (224, 64)
    with torch.device(device):
        tower = CLIPVisionModel(CLIPVisionConfig(**shape, image_size=side, patch_size=14)).to(_DTYPE).eval()
        pixels = torch.randn(batch, 3, side, side, dtype=_DTYPE)
    repeats = 2 if tiny else 10
    with torch.inference_mode():
        for _ in range(2):
            tower(pixels)
        _synchronize(device)
        started = time.perf_counter()
        for _ in range(repeats):
            tower(pixels)
        _synchronize(device)
    return {"images_per_second": batch * repeats / (time.perf_counter() - started)}


def train(work: dict[str, Any]) -> dict[str, Any]:
    """Times the steps of a setting. What it cannot do is an outcome, told in the table: out of memory,
    an attention kernel that this GPU or this torch does not have, a compiler that is missing."""
    try:
        return _train(work)
    except torch.OutOfMemoryError:
        return {"outcome": "out of memory"}
    except (RuntimeError, ImportError, NotImplementedError, ValueError, TypeError) as error:
        traceback.print_exc()
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return {"outcome": f"failed: {line[:200]}"}


@dataclass(frozen=True)
class Packed:
    """A batch on the device, and what its figures need."""

    batch: Batch
    lengths: tuple[int, ...]
    supervised: int


def _train(work: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(work["seed"])
    stage, device, shape = work["stage"], work["device"], SHAPES[work["shape"]]
    model = _model(shape, work["depth"], work["attention"], device)
    apply_freeze_policy(model, "projector" if stage == "pretrain" else "all")
    _set_recompute(model, work["recompute"])
    model.train()
    if work["compile"]:
        compile_layers(model.language)
    batches = [_batch(work, shape, random.Random(f"{work['seed']}/{i}")) for i in range(_DIFFERENT_BATCHES)]
    optimizer = MasterAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step(packed: Packed) -> Tensor:
        loss_sum, _ = model(packed.batch)
        loss = loss_sum / packed.supervised
        loss.backward()
        optimizer.step(max_norm=1.0)
        return loss.detach()

    for number in range(work["warm_up"]):
        step(batches[number % len(batches)])
    _synchronize(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    measured = [batches[number % len(batches)] for number in range(work["steps"])]
    started = time.perf_counter()
    for packed in measured:
        loss = step(packed)
    _synchronize(device)
    seconds = time.perf_counter() - started
    if not torch.isfinite(loss):
        return {"outcome": "failed: the loss is not finite"}
    figures = _figures(work, shape, measured, seconds)
    if work.get("profile"):
        figures["kernels"] = _kernels(lambda: step(batches[0]))
    return figures


def _kernels(step: Callable[[], Tensor], most: int = 12) -> list[tuple[str, float]]:
    """The kernels that took most of a step, each with its share of the time of all kernels."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    spent = {event.key: float(event.self_device_time_total) for event in profile.key_averages()}
    ordered = sorted(spent.items(), key=lambda item: -item[1])
    return [(name, time_ / sum(spent.values())) for name, time_ in ordered[:most]]


def _figures(work: dict[str, Any], shape: Shape, measured: list[Packed], seconds: float) -> dict[str, Any]:
    stage = work["stage"]
    samples = sum(len(packed.lengths) for packed in measured)
    lengths = [length for packed in measured for length in packed.lengths]
    supervised = sum(packed.supervised for packed in measured)
    done = shape.flops(stage, work["depth"], lengths, supervised, samples)
    whole = shape.flops(stage, shape.layers, lengths, supervised, samples)
    cells = len(measured) * work["rows"] * work["row_tokens"]
    cuda = work["device"] == "cuda"
    return {
        "outcome": "measured",
        "seconds_per_step": seconds / len(measured),
        "tokens_per_second": sum(lengths) / seconds,
        "samples_per_second": samples / seconds,
        "flops_per_second": done / seconds,
        "whole_flops_per_sample": whole / samples,
        "padding": 1 - sum(lengths) / cells,
        "peak_bytes": torch.cuda.max_memory_reserved() if cuda else bench_support.peak_bytes(),
        "lengths": f"Lengths: {describe_lengths(lengths)}; {supervised / sum(lengths):.0%} supervised.",
    }


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# --- the model ---


def _model(shape: Shape, depth: int, attention: str, device: str) -> VisionLanguageModel:
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=depth,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation={"flex": "flex_attention"}.get(attention, "sdpa"),
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(_DTYPE)
    try:
        with torch.device(device):
            language = LlamaForCausalLM(config)
            projector = build_projector("linear", shape.vision_hidden, shape.hidden)
    finally:
        torch.set_default_dtype(before)
    if attention == "varlen" and not isolate_samples(language):
        raise ValueError("variable-length attention does not take this model")
    return VisionLanguageModel(language, projector)


def _set_recompute(model: VisionLanguageModel, share: float) -> None:
    """Recomputes the first `share` of the layers in the backward pass, instead of keeping what they made."""
    if not share:
        return
    model.language.gradient_checkpointing_enable({"use_reentrant": False})
    layers = model.language.model.layers
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number < round(share * len(layers))


class MasterAdamW:
    """torch's fused AdamW on fp32 copies of bf16 weights, by chunks: fp32 gradients then take little room."""

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        self._all = parameters
        self._chunks: list[tuple[list[nn.Parameter], list[nn.Parameter], torch.optim.Optimizer]] = []
        chunk: list[nn.Parameter] = []
        for parameter in parameters:
            chunk.append(parameter)
            if sum(p.numel() for p in chunk) >= _CHUNK_ELEMENTS:
                self._add(chunk, lr)
                chunk = []
        if chunk:
            self._add(chunk, lr)

    def _add(self, chunk: list[nn.Parameter], lr: float) -> None:
        masters = [nn.Parameter(parameter.detach().float()) for parameter in chunk]
        self._chunks.append((chunk, masters, torch.optim.AdamW(masters, lr=lr, weight_decay=0.0, fused=True)))

    def step(self, max_norm: float) -> None:
        """Clips the gradients by their global norm, updates, and drops them."""
        nn.utils.clip_grad_norm_(self._all, max_norm)
        for chunk, masters, optimizer in self._chunks:
            for parameter, master in zip(chunk, masters, strict=True):
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                torch._foreach_copy_(chunk, masters)


# --- batches ---


def _batch(work: dict[str, Any], shape: Shape, rng: random.Random) -> Packed:
    """Rows of samples, best fit, as training packs a global batch; of a larger batch, some of the rows."""
    stage: StageName = work["stage"]
    room, wanted = work["row_tokens"], work["rows"]
    text = quantile_lengths(stage, 64 * wanted, work["text_scale"])
    lengths = [min(room, shape.image_tokens + length) for length in text]
    rng.shuffle(lengths)
    sizes = [[lengths[i] for i in row] for row in rng.sample(pack(lengths, room), wanted)]
    rows = [[_row(stage, size, shape, rng) for size in row] for row in sizes]
    if work["attention"] == "varlen":
        batch = _flat(rows, sizes, room, shape)
    else:
        batch = _pad_to(collate_packed(rows, shape.vision_hidden), room)
    batch = replace(batch, features_MD=batch.features_MD.to(_DTYPE)).to(torch.device(work["device"]))
    supervised = int((batch.labels_BT[:, 1:] != IGNORE_INDEX).sum())
    return Packed(batch, tuple(size for row in sizes for size in row), supervised)


def _flat(rows: list[list[Row]], sizes: list[list[int]], room: int, shape: Shape) -> Batch:
    """All samples in one row of one length for all batches: what is left over is a sample without a label."""
    padding = len(rows) * room - sum(size for row in sizes for size in row)
    samples = [sample for row in rows for sample in row]
    if padding:
        samples.append(Row([0] * padding, [IGNORE_INDEX] * padding, None))
    return collate_flat(samples, shape.vision_hidden)


def _row(stage: StageName, length: int, shape: Shape, rng: random.Random) -> Row:
    """A sample of `length` tokens: an image, then text, the end of which is supervised."""
    text = length - shape.image_tokens
    ids = [IMAGE_TOKEN_INDEX] * shape.image_tokens + [rng.randrange(shape.vocabulary) for _ in range(text)]
    supervised = max(1, round(_SUPERVISED[stage] * text))
    labels = [IGNORE_INDEX] * (length - supervised) + ids[length - supervised :]
    return Row(ids, labels, torch.randn(shape.image_tokens, shape.vision_hidden))


def _pad_to(batch: Batch, length: int) -> Batch:
    """Pads rows to `length`, so that all batches have one shape; it counts on from the last sample."""
    extra = length - batch.input_ids_BT.shape[1]
    positions_BT = batch.position_ids_BT
    if positions_BT is None:
        positions_BT = torch.arange(batch.input_ids_BT.shape[1]).repeat(len(batch.input_ids_BT), 1)
    more = positions_BT[:, -1:] + torch.arange(1, extra + 1)
    return Batch(
        nn.functional.pad(batch.input_ids_BT, (0, extra)),
        nn.functional.pad(batch.labels_BT, (0, extra), value=IGNORE_INDEX),
        batch.features_MD,
        None,
        torch.cat([positions_BT, more], dim=1),
    )

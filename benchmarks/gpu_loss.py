"""The loss on one CUDA GPU: full logits, Rayva's chunks of several sizes, and Liger's fused kernel.

Forward and backward in bf16 from the same hidden states and the same LM head; time is the median of repeated
runs, memory what is allocated above hidden states and weights. Liger's kernel is measured where the package
liger-kernel is installed: as it is by default, and with sums in fp32 as Rayva has them.

    python benchmarks/gpu_loss.py
    python benchmarks/gpu_loss.py --device cpu --tokens 64 --shapes 32x512     # only tests the code
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import bench_support as support  # puts platform/ on the path
import torch
from torch import Tensor, nn
from torch.nn import functional

from rayva.model import loss as rayva_loss

_TITLE = "The loss on one GPU"
_CHUNKS = (2**24, 2**26, 2**28)
Side = Callable[[Tensor, Tensor, nn.Linear], Tensor]


def main() -> None:
    options = _options()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; --device cpu only tests the code")
    started_on = support.machine()
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    figures: dict[str, Any] = {"device": name, "torch": torch.__version__, "shapes": {}}
    for shape in options.shapes:
        hidden, vocabulary = map(int, shape.split("x"))
        for trained in (False, True):
            key = f"{shape}, head {'trained' if trained else 'frozen'}"
            figures["shapes"][key] = _measure(options, hidden, vocabulary, trained)
    support.report(options, _TITLE, _body(options, figures), figures, started_on)


def _options() -> argparse.Namespace:
    parser = support.parser(__doc__ or "")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tokens", type=int, default=8192, help="supervised positions (default: 8192)")
    shapes = ["4096x32000", "576x49152", "4096x128256"]
    parser.add_argument("--shapes", nargs="+", default=shapes, metavar="HIDDENxVOCABULARY")
    parser.add_argument("--repeats", type=int, default=10)
    return parser.parse_args()


def _sides() -> dict[str, Side]:
    sides: dict[str, Side] = {"full logits": _full}
    sides |= {f"Rayva, {size / 2**20:.0f} Mi logits at once": _chunked(size) for size in _CHUNKS}
    if importlib.util.find_spec("liger_kernel") and torch.cuda.is_available():
        sides |= {"Liger": _liger(None), "Liger, sums in fp32": _liger(torch.float32)}
    return sides


def _full(hidden_SH: Tensor, targets_S: Tensor, head: nn.Linear) -> Tensor:
    return functional.cross_entropy(head(hidden_SH).float(), targets_S, reduction="sum")


def _chunked(size: int) -> Side:
    def side(hidden_SH: Tensor, targets_S: Tensor, head: nn.Linear) -> Tensor:
        sizes = {"cpu": size, "cuda": size}
        with (
            patch.object(rayva_loss, "_LOGITS_AT_ONCE", sizes),
            patch.object(rayva_loss, "_fused_kernel", lambda: None),
        ):
            return rayva_loss.cross_entropy_sum(hidden_SH, targets_S, head)

    return side


def _liger(accumulate: torch.dtype | None) -> Side:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def side(hidden_SH: Tensor, targets_S: Tensor, head: nn.Linear) -> Tensor:
        loss: Tensor = liger_fused_linear_cross_entropy(
            hidden_SH, head.weight, targets_S, reduction="sum", accum_dtype=accumulate
        )
        return loss

    return side


def _measure(options: argparse.Namespace, hidden: int, vocabulary: int, trained: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    device = torch.device(options.device)
    head = nn.Linear(hidden, vocabulary, bias=False, device=device, dtype=torch.bfloat16)
    head.requires_grad_(trained)
    hidden_SH = torch.randn(options.tokens, hidden, device=device, dtype=torch.bfloat16, requires_grad=True)
    targets_S = torch.randint(0, vocabulary, (options.tokens,), device=device)
    # As in training, the sum is divided by the number of supervised tokens before the backward pass.
    wanted = [hidden_SH, *head.parameters()] if trained else [hidden_SH]
    found: dict[str, Any] = {}
    for name, side in _sides().items():
        seconds, peak, value = [], 0, 0.0
        for number in range(options.repeats + 2):
            before = _reset(device)
            started = time.perf_counter()
            loss = side(hidden_SH, targets_S, head)
            torch.autograd.grad(loss / options.tokens, wanted)
            _synchronize(device)
            if number >= 2:
                seconds.append(time.perf_counter() - started)
            if device.type == "cuda":
                peak = torch.cuda.max_memory_allocated() - before
            value = float(loss.detach()) / options.tokens
            del loss
        found[name] = {"seconds": statistics.median(seconds), "peak_bytes": peak, "loss": value}
    return found


def _reset(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    _synchronize(device)
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _body(options: argparse.Namespace, figures: dict[str, Any]) -> str:
    parts = [
        f"{figures['device']}, torch {figures['torch']}; {options.tokens:,} supervised positions, bf16, "
        "forward and backward. Ratios are to full logits."
    ]
    for shape, found in figures["shapes"].items():
        full = found["full logits"]
        rows = [
            [
                name, f"{1000 * side['seconds']:.1f}", f"{side['seconds'] / full['seconds']:.2f}",
                f"{side['peak_bytes'] / support.MIB:,.0f}",
                f"{side['peak_bytes'] / full['peak_bytes']:.3f}" if full["peak_bytes"] else "-",
                f"{side['loss']:.4f}",
            ]
            for name, side in found.items()
        ]  # fmt: skip
        header = ["", "ms", "time", "memory, MiB", "memory", "loss"]
        parts.append(f"### {shape}\n\n" + support.table(header, rows))
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()

"""Peak memory of the loss: Rayva's chunks over supervised positions against logits of all positions.

Each side runs forward and backward in a process of its own, on the same hidden states and the same LM head;
what is compared is how far the process grows while it does. Full logits are computed as Hugging Face's
causal-language-model loss does it: logits in the hidden states' precision, cross-entropy in fp32. Rayva's
side is measured with all positions supervised, which is its worst case, and with the given share.

    python benchmarks/loss_memory.py                      # 8,192 tokens, a vocabulary of 49,152
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import bench_support as support

_TITLE = "Peak memory of the loss"


def main() -> None:
    options = _options()
    if options.child:
        support.tell(_measure(json.loads(options.child)))
        return
    started_on = support.machine()
    shape = {key: getattr(options, key) for key in ("tokens", "vocabulary", "hidden", "dtype", "seed")}
    figures = {
        "full": support.run_child(__file__, shape | {"side": "full", "supervised": 1.0}),
        "all": support.run_child(__file__, shape | {"side": "chunked", "supervised": 1.0}),
        "some": support.run_child(__file__, shape | {"side": "chunked", "supervised": options.supervised}),
    }
    support.report(options, _TITLE, _body(options, figures), figures, started_on)


def _options() -> argparse.Namespace:
    parser = support.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--supervised", type=float, default=0.4, help="share of positions (default: 0.4)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _measure(shape: dict[str, Any]) -> dict[str, float]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rayva.model.batch import Batch
    from rayva.model.vlm import VisionLanguageModel

    torch.manual_seed(shape["seed"])
    # No layers: what is left is the embedding, a norm and the head, and the loss is all that takes memory.
    config = LlamaConfig(
        vocab_size=shape["vocabulary"], hidden_size=shape["hidden"], intermediate_size=64,
        num_hidden_layers=0, num_attention_heads=1, tie_word_embeddings=True,
        max_position_embeddings=shape["tokens"],
    )  # fmt: skip
    language = LlamaForCausalLM(config)
    model = VisionLanguageModel(language, torch.nn.Linear(4, shape["hidden"])).to(
        getattr(torch, shape["dtype"])
    )
    ids = torch.randint(0, shape["vocabulary"], (1, shape["tokens"]))
    labels = torch.where(torch.rand(1, shape["tokens"]) < shape["supervised"], ids, -100)
    # Gradients exist beforehand, as they do in all steps of a training but the first.
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step(size: int) -> float:
        if shape["side"] == "full":
            loss = language(input_ids=ids[:, :size], labels=labels[:, :size]).loss
        else:
            batch = Batch(ids[:, :size], labels[:, :size], torch.zeros(0, 4))
            total, count = model.loss_sum(batch)
            loss = total / count.clamp(min=1)
        loss.backward()
        return float(loss.detach())

    step(64)  # what libraries allocate on first use
    before = support.peak_bytes()
    started = time.perf_counter()
    value = step(shape["tokens"])
    seconds = time.perf_counter() - started
    return {"peak_bytes": support.peak_bytes() - before, "seconds": seconds, "loss": value}


def _body(options: argparse.Namespace, figures: dict[str, Any]) -> str:
    full = figures["full"]
    labels = {
        "full": "logits of all positions",
        "all": "Rayva, all positions supervised",
        "some": f"Rayva, {options.supervised:.0%} supervised",
    }
    rows = [
        [
            label,
            f"{figures[side]['peak_bytes'] / support.MIB:,.0f}",
            f"{figures[side]['peak_bytes'] / full['peak_bytes']:.3f}",
            f"{figures[side]['seconds'] / full['seconds']:.2f}",
        ]
        for side, label in labels.items()
    ]
    header = ["", "peak memory, MiB", "of full logits", "time, of full logits"]
    difference = abs(figures["all"]["loss"] - full["loss"]) / abs(full["loss"])
    return (
        f"{options.tokens:,} tokens, a vocabulary of {options.vocabulary:,}, hidden size {options.hidden}, "
        f"{options.dtype}; forward and backward. The losses of the first two differ by {difference:.1e} "
        f"(relative).\n\n" + support.table(header, rows)
    )


if __name__ == "__main__":
    main()

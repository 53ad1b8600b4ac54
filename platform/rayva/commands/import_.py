"""Turns a LLaVA checkpoint of another program into a Rayva model folder.

SRC is a folder of the original LLaVA code (v0 to 1.5; full, or LoRA with its base), a stage-1
mm_projector.bin with its base language model, or a Hugging Face LLaVA folder. What it is follows from its
content, never from its name. Files are read as tensors alone: no code in them can run. OUT is what
`rayva export`, `rayva chat` and the endpoint read; it appears when it is complete.
"""

from __future__ import annotations

import argparse
from pathlib import Path

TEMPLATES = ("v1", "v0", "llama_2", "chatml", "plain", "tokenizer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", type=Path, help="checkpoint folder, or mm_projector.bin")
    parser.add_argument("target", metavar="OUT", type=Path, help="folder to write; must not exist yet")
    parser.add_argument(
        "--language", metavar="DIR", type=Path, help="base language model of LoRA weights or a projector"
    )
    parser.add_argument(
        "--vision",
        metavar="DIR",
        type=Path,
        help="the vision tower's folder, instead of the one that mm_vision_tower names; tensors of the "
        "tower that the checkpoint holds itself are kept",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        type=Path,
        help="the tokenizer's folder, if it is not in SRC or --language",
    )
    parser.add_argument(
        "--template",
        choices=TEMPLATES,
        help="conversation template that the model was trained with; by default found in the checkpoint, "
        "else v1",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message, instead of the template's own")
    parser.add_argument(
        "--aspect", choices=("square", "pad"), help="how pictures become square, if SRC does not tell"
    )
    parser.add_argument(
        "--layer", type=int, metavar="N", help="hidden state of the tower that the projector takes (-2)"
    )


def run(options: argparse.Namespace) -> int:
    """Imports, and tells what the checkpoint was taken for."""
    from rayva.model.import_model import import_model
    from rayva.model.import_parts import Choices
    from rayva.model.shards import output_errors

    chosen = ("language", "vision", "tokenizer", "template", "system", "aspect", "layer")
    choices = Choices(**{name: getattr(options, name) for name in chosen})
    with output_errors(options.target):
        report = import_model(options.source, options.target, choices)
    vision = report.settings.vision
    kinds = {
        "original": "an original LLaVA checkpoint",
        "lora": "LoRA weights of the original LLaVA, merged into their base",
        "projector": "a stage-1 projector on its base language model",
        "hf": "a Hugging Face LLaVA checkpoint",
    }
    print(f"{options.source}: {kinds[report.kind]}.")
    print(
        f"  {vision.kind} tower, layer {vision.layer}, {vision.tokens} tokens an image, {vision.aspect}; "
        f"{report.settings.projector} projector"
    )
    for note in report.notes:
        print(f"  {note}")
    print(f"{options.target}: written.")
    return 0

"""Writes a trained model for other programs.

hf: a Hugging Face LLaVA folder (transformers, vLLM), its logits checked against the model's own.
llava: the layout of the original LLaVA code. projector: the projector alone, as stage 1 of the
original writes it.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN_OR_FOLDER", help="storage root of a run, or a model folder")
    parser.add_argument("target", metavar="OUT", type=Path, help="folder to write; must not exist yet")
    parser.add_argument("--format", choices=("hf", "llava", "projector"), default="hf")
    parser.add_argument("--tracking-uri", help="where the registry is, for models:/NAME@ALIAS")


def run(options: argparse.Namespace) -> int:
    """Exports and tells where to and, for hf, how near the logits are."""
    from rayva.model.export_hf import export_hf
    from rayva.model.export_llava import export_llava, export_projector
    from rayva.model.shards import output_errors
    from rayva.serving.source import find_model, local_folder

    folder, _storage = local_folder(find_model(options.source, options.tracking_uri))
    with output_errors(options.target):
        if options.format == "hf":
            difference = export_hf(folder, options.target)
            print(f"{options.target}: written; the largest difference of a logit is {difference:.1e} (fp32).")
            return 0
        write = export_llava if options.format == "llava" else export_projector
        write(folder, options.target)
    print(f"{options.target}: written.")
    return 0

"""Whether vLLM answers as transformers does: greedy tokens of one exported model in both.

Asks questions about a picture each, token by token in the model's own chat template, and compares the ids of
the prompts and of the answers. vLLM lives in a virtual environment of its own:

    python benchmarks/vllm_agreement.py RUN_OR_FOLDER --vllm-python /opt/vllm/bin/python
    python benchmarks/vllm_agreement.py --language LANGUAGE_MODEL_DIR --vllm-python /opt/vllm/bin/python

A run or model folder is exported first; a Hugging Face LLaVA folder is taken as it is. With --language, a
model is made: that language model behind a random CLIP and a random projector, whose answers nobody would
want, but which depend on the picture. The exit code is 1 where any answer differs.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "platform")]

import torch  # noqa: E402
from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration  # noqa: E402

from rayva.data import scenes  # noqa: E402

SUBJECTS = ("What is in the picture?", "What colour is it?", "Where is it?", "Describe the picture.")
SIDE, PATCH, HIDDEN = 64, 16, 192


def main() -> int:
    options = _options()
    with tempfile.TemporaryDirectory(prefix="rayva-vllm-") as scratch:
        folder = Path(scratch)
        model = _model(options, folder)
        pictures = _pictures(options.prompts)
        questions = [SUBJECTS[number % len(SUBJECTS)] for number in range(options.prompts)]
        ours = transformers_answers(model, pictures, questions, options.tokens, options.dtype)
        theirs = vllm_answers(options.vllm_python, model, pictures, questions, options, folder)
    same_prompt = sum(a["prompt"] == b["prompt"] for a, b in zip(ours, theirs, strict=True))
    same_answer = sum(a["answer"] == b["answer"] for a, b in zip(ours, theirs, strict=True))
    report = {
        "prompts": len(ours),
        "same prompt ids": same_prompt,
        "same answer ids": same_answer,
        "different answers": len({tuple(found["answer"]) for found in ours}),
        "answer tokens": sum(len(found["answer"]) for found in ours),
        "dtype": options.dtype,
    }
    print(json.dumps(report, indent=1))
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a != b:
            print(f"{number}: transformers {a}\n   vLLM {b}")
    return 0 if same_prompt == same_answer == len(ours) else 1


def _options() -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("source", nargs="?", help="a run, a model folder, or a Hugging Face LLaVA folder")
    parser.add_argument("--language", type=Path, help="make a model around this language model instead")
    parser.add_argument("--template", default="chatml", help="conversation template of the made model")
    parser.add_argument("--vllm-python", type=Path, required=True, help="the Python that has vLLM")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=24, help="longest answer")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    if (options.source is None) == (options.language is None):
        parser.error("give either RUN_OR_FOLDER or --language")
    return options


def _model(options: argparse.Namespace, folder: Path) -> Path:
    """A Hugging Face LLaVA folder."""
    from rayva.model.export_hf import export_hf
    from rayva.serving.source import find_model, local_folder

    if options.source and (Path(options.source) / "processor_config.json").is_file():
        return Path(options.source).resolve()
    if options.language:
        source = make_model(options.language, folder, options.template)
        export_hf(source, folder / "hf")
    else:
        source, storage = local_folder(find_model(options.source))
        export_hf(source, folder / "hf")
        del storage
    return folder / "hf"


def make_model(language: Path, folder: Path, template: str) -> Path:
    """A stage-1 projector and a CLIP, both random, imported on a language model."""
    from transformers import CLIPVisionConfig, CLIPVisionModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from rayva.model.import_model import import_model
    from rayva.model.import_parts import Choices
    from rayva.model.projector import build_projector

    torch.manual_seed(0)
    shape = CLIPVisionConfig(
        hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_hidden_layers=4, num_attention_heads=4,
        image_size=SIDE, patch_size=PATCH,
    )  # fmt: skip
    CLIPVisionModel(shape).save_pretrained(folder / "tower")
    square = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square).save_pretrained(folder / "tower")
    width = AutoConfig.from_pretrained(language).hidden_size
    projector = build_projector("mlp2x_gelu", HIDDEN, width)
    names = {f"model.mm_projector.{name}": tensor for name, tensor in projector.state_dict().items()}
    torch.save(names, folder / "mm_projector.bin")
    choices = Choices(language=language, vision=folder / "tower", template=template)
    import_model(folder / "mm_projector.bin", folder / "model", choices)
    return folder / "model"


def _pictures(number: int) -> list[Any]:
    """Drawn scenes of the test split."""
    rng = random.Random(0)
    return [scenes.render(scenes.draw_scene(rng, "test")) for _ in range(number)]


def transformers_answers(
    model: Path, pictures: list[Any], questions: list[str], tokens: int, dtype: str
) -> list[dict[str, list[int]]]:
    """Ids of each prompt and greedy answer, one question at a time."""
    llava = LlavaForConditionalGeneration.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    processor = AutoProcessor.from_pretrained(model)
    answers = []
    for picture, question in zip(pictures, questions, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = processor(text=text, images=picture, add_special_tokens=False, return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].to(llava.dtype)
        ids = llava.generate(**inputs, max_new_tokens=tokens)[0].tolist()
        length = inputs.input_ids.shape[1]
        answers.append({"prompt": ids[:length], "answer": ids[length:]})
    return answers


def vllm_answers(
    python: Path,
    model: Path,
    pictures: list[Any],
    questions: list[str],
    options: argparse.Namespace,
    folder: Path,
) -> list[dict[str, list[int]]]:
    """The same from vLLM, in a process of its own."""
    work = {"model": str(model), "questions": questions, "tokens": options.tokens, "dtype": options.dtype}
    work["length"] = 512
    (folder / "work.json").write_text(json.dumps(work), encoding="utf-8")
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")
    script = Path(__file__).with_name("vllm_greedy.py")
    subprocess.run([str(python), str(script), str(folder)], check=True, stdout=sys.stderr)
    found: list[dict[str, list[int]]] = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    sys.exit(main())

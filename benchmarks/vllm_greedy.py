"""Greedy answers of vLLM to questions about a picture each: the half of vllm_agreement.py that needs vLLM.

It runs in vLLM's own Python and imports nothing of Rayva. Its argument is a folder with work.json
(`model`, `questions`, `tokens`, `dtype`, `length`) and one PNG a question; it writes answers.json there:
for each question the ids of the prompt and of the answer.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

for name, value in {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}.items():
    os.environ.setdefault(name, value)


def main(folder: Path) -> None:
    """Asks every question in one batch, through the checkpoint's own chat template."""
    from PIL import Image
    from vllm import LLM, SamplingParams

    work = json.loads((folder / "work.json").read_text(encoding="utf-8"))
    engine = LLM(
        work["model"],
        dtype=work["dtype"],
        max_model_len=work["length"],
        limit_mm_per_prompt={"image": 1},
        enforce_eager=True,
        seed=0,
    )
    conversations = []
    for number, question in enumerate(work["questions"]):
        picture = Image.open(folder / f"{number}.png").convert("RGB")
        content = [{"type": "image_pil", "image_pil": picture}, {"type": "text", "text": question}]
        conversations.append([{"role": "user", "content": content}])
    sampling = SamplingParams(temperature=0.0, max_tokens=work["tokens"])
    answers = [
        {"prompt": list(found.prompt_token_ids or ()), "answer": list(found.outputs[0].token_ids)}
        for found in engine.chat(conversations, sampling, use_tqdm=False)
    ]
    (folder / "answers.json").write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

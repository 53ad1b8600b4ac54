"""vLLM answers as transformers does. vLLM lives in an environment of its own, whose Python must be given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.export.tiny_model import make_tokenizer

ROOT = Path(__file__).resolve().parents[2]
VLLM = os.environ.get("RAYVA_VLLM_PYTHON")


@pytest.mark.slow
@pytest.mark.skipif(VLLM is None, reason="RAYVA_VLLM_PYTHON names no Python with vLLM (docs/interop.md)")
def test_greedy_tokens_are_the_same(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.15,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "language")
    tokenizer.save_pretrained(tmp_path / "language")
    command = [
        sys.executable, str(ROOT / "benchmarks/vllm_agreement.py"), "--language", str(tmp_path / "language"),
        "--template", "v1", "--vllm-python", str(VLLM),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["same prompt ids"] == report["same answer ids"] == report["prompts"] == 20
    assert report["different answers"] > 5

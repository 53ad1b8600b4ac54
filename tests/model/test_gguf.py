"""A GGUF file becomes a Hugging Face folder that computes the same thing."""

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rayva.errors import WeightsError
from rayva.model.gguf import convert_gguf

HEADS, KV_HEADS, HIDDEN = 4, 2, 64
TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *map(chr, range(33, 127)),
    "\u0120",
    "\u010a",
    "he",
    "ll",
]
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers.": "blk.",
}


def gguf_name(name):
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def gguf_value(name, value):
    """llama.cpp pairs the halves of each head that rotary embeddings turn."""
    for part, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
        if part in name:
            value = value.reshape(heads, 2, -1, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
    return np.ascontiguousarray(value)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=128,
        rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=True, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def source(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(len(TOKENS))
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *[1] * (len(TOKENS) - 3)])
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            writer.add_tensor(gguf_name(name), gguf_value(name, tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_written_folder_computes_the_same_logits(model, source, tmp_path):
    convert_gguf(source, tmp_path / "language")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "language", dtype=torch.float32)
    assert type(written) is LlamaForCausalLM
    assert not hasattr(written.config, "quantization_config")
    assert written.config.tie_word_embeddings
    ids_BT = torch.randint(3, len(TOKENS), (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(written(ids_BT).logits, model(ids_BT).logits, atol=1e-5, rtol=1e-5)


def test_the_tokenizer_comes_along(source, tmp_path):
    convert_gguf(source, tmp_path / "language", "bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "language")
    ids = tokenizer("hello<|im_end|>").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["he", "ll", "o", "<|im_end|>"]
    assert tokenizer.eos_token == "<|im_end|>"
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "language")
    assert written.dtype == torch.bfloat16


def test_other_files_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="no GGUF file at"):
        convert_gguf(tmp_path / "gone.gguf", tmp_path / "out")
    (tmp_path / "x.gguf").write_bytes(b"<html>")
    with pytest.raises(WeightsError, match="is not a GGUF file"):
        convert_gguf(tmp_path / "x.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()

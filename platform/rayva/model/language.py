"""Loads the language model f and its tokenizer: any Hugging Face causal language model."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from rayva.errors import WeightsError

_LOGIT_CHANGES = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": 1.0}
"""Config keys, with their neutral values, of models that change logits after the LM head."""
_AS_IT_STANDS = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Names of the class that takes tokenizer.json as it is. For some types of models (Qwen2) transformers
rebuilds the tokenizer as theirs though tokenizer_config.json names this class; its ids may be others then."""


def load_language_model(path: str, dtype: torch.dtype, revision: str | None = None) -> PreTrainedModel:
    """Loads a causal language model from a local folder or by its hub name.

    Safetensors are preferred; older `.bin` files are read as tensors alone, so that no code in them can
    run. Raises `WeightsError` where the model is missing, damaged, incomplete, or of a kind that this
    project does not compute exactly.
    """
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            revision=revision,
            dtype=dtype,
            weights_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # a damaged or hostile file fails in any way it likes
        raise WeightsError(
            f"The language model {path!r} cannot be loaded: {_first_line(error)}",
            "Check that it is a causal language model in Hugging Face format, that its files are whole, "
            "and, for a hub name, that the network and the cache allow it.",
        ) from error
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise WeightsError(
            f"The language model {path!r} lacks weights: {', '.join(missing[:4])} ({len(missing)} in all)",
            "Its weight files do not match its config.json: download or save it again.",
        )
    refuse_changed_logits(path, model)
    _require_plain_head(path, model)
    return model


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a local folder or hub name; `WeightsError` where that fails."""
    try:
        named = get_tokenizer_config(path, revision=revision).get("tokenizer_class")
        if named in _AS_IT_STANDS:
            return PreTrainedTokenizerFast.from_pretrained(path, revision=revision)
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises the base class itself
        raise WeightsError(
            f"The tokenizer of {path!r} cannot be loaded: {_first_line(error)}",
            "The language model's folder must hold its tokenizer files.",
        ) from error


def cover_vocabulary(language: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Gives the embedding and the LM head a row for every token; returns how many were missing.

    A new row is the mean of the others, as in the original code, so that its logit is the mean of all
    logits. A vocabulary that is padded beyond the tokenizer's stays as it is.
    """
    rows: int = language.get_input_embeddings().weight.shape[0]
    missing = len(tokenizer) - rows
    if missing <= 0:
        return 0
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for module in (language.get_input_embeddings(), language.get_output_embeddings()):
            weight_VH = module.weight
            weight_VH[rows:] = weight_VH[:rows].float().mean(dim=0).to(weight_VH.dtype)
    return missing


def eos_token_ids(language: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """All token ids that end a generation: the generation config's and the tokenizer's."""
    ids: set[int] = set()
    config = language.generation_config
    for value in (config.eos_token_id if config else None, tokenizer.eos_token_id):
        if isinstance(value, int):
            ids.add(value)
        elif value is not None:
            ids.update(value)
    return tuple(sorted(ids))


def refuse_changed_logits(path: str, model: PreTrainedModel) -> None:
    """Raises `WeightsError` for a model whose config says that it changes its logits after the LM head."""
    for key, neutral in _LOGIT_CHANGES.items():
        value = getattr(model.config, key, neutral)
        if value not in (neutral, None):
            raise WeightsError(
                f"The language model {path!r} sets {key}={value}: it changes its logits after the LM head, "
                "which the loss over supervised positions does not reproduce",
                "Choose a language model without it, such as one of the Llama family.",
            )


def _require_plain_head(path: str, model: PreTrainedModel) -> None:
    """Raises `WeightsError` for a model whose logits are not its LM head's of its last hidden states.

    What no known setting tells is found by a forward pass over a few tokens.
    """
    if not _head_gives_the_logits(model):
        raise WeightsError(
            f"The language model {path!r} ({model.config.model_type}) changes its hidden states or logits "
            "around the LM head, which the loss over supervised positions does not reproduce",
            "Choose a language model without that, such as one of the Llama family.",
        )


@torch.no_grad()
def _head_gives_the_logits(model: PreTrainedModel) -> bool:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids_BT = torch.arange(1, 8, device=model.device)[None] % vocabulary
    # Loaded models evaluate: without dropout, two passes are alike.
    logits_BTV = model(ids_BT, use_cache=False).logits
    hidden_BTH = getattr(model.base_model(ids_BT, use_cache=False), "last_hidden_state", None)
    if hidden_BTH is None:
        return False
    own_BTV = model.get_output_embeddings()(hidden_BTH)
    difference = (own_BTV.float() - logits_BTV.float()).norm()
    # Rounding alone may differ: some models compute their logits in fp32.
    return bool(difference <= 0.02 * logits_BTV.float().norm())


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]

"""How many positions a language model has: what training, serving and evaluation go by."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

_STRETCHED = {"linear", "dynamic"}
"""Kinds of RoPE scaling whose factor counts from `max_position_embeddings`."""


def positions(config: PretrainedConfig) -> int | None:
    """Positions that a language model is made for, image tokens included; None where it sets no limit.

    With RoPE they are those that its scaling reaches: a model computes more of them too, only badly. With
    learned absolute positions, which have no scaling, they are a hard limit: the table has no further rows.

    "linear" and "dynamic" stretch `max_position_embeddings` by their factor, and "yarn" what the model was
    trained on before. Where others scale ("llama3", "longrope", "mrope", or each kind of layer by itself),
    `max_position_embeddings` is the number after it.
    """
    own: int | None = getattr(config, "max_position_embeddings", None)
    if own is None:
        return None
    scaling = _scaling(config)
    kind = scaling.get("rope_type") or scaling.get("type")
    factor = float(scaling.get("factor") or 1.0)  # "yarn" may leave it out
    if kind in _STRETCHED:
        return int(own * factor)
    if kind == "yarn":
        return max(own, int((scaling.get("original_max_position_embeddings") or own) * factor))
    return own


def _scaling(config: PretrainedConfig) -> dict[str, Any]:
    """How RoPE is scaled: `rope_parameters` of transformers 5, `rope_scaling` before; {} where it is not.

    Where it differs by kind of layer the values are such settings themselves, so no kind is found at the top.
    """
    for name in ("rope_parameters", "rope_scaling"):
        found = getattr(config, name, None)
        if isinstance(found, dict) and found:
            return found
    return {}

"""LoRA adapters (arXiv 2106.09685) in the language model: put in, saved in PEFT's format, merged, taken out.

W' = W + alpha / r * B A (equation 3), for W [out, in], A [r, in] and B [out, r].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rayva.errors import RecipeError
from rayva.model.freeze import is_adapter
from rayva.recipes.schema import Lora

_PREFIX = "base_model.model."
"""What PEFT's files put before the names of the model that was adapted."""


def add_adapters(language: PreTrainedModel, lora: Lora) -> None:
    """Puts adapters beside the matrices that `lora.targets` names; only they are trained afterwards.

    Raises `RecipeError` for a name that no matrix of a layer has; the LM head, which the loss needs plain,
    and the embeddings are none.
    """
    if not isinstance(lora.targets, str):
        _require_targets(language, lora.targets)
    inject_adapter_in_model(_config(lora), language)
    for name, layer in _adapted(language):
        if not isinstance(layer.get_base_layer(), nn.Linear):
            raise RecipeError(
                f"{name} of the language model is no linear layer that LoRA's weights could be merged into",
                "set lora.r=0, or name linear layers in lora.targets",
            )


def _require_targets(language: PreTrainedModel, targets: tuple[str, ...]) -> None:
    """PEFT itself is content with one name that is found, and takes embeddings, which are not merged here."""
    head = language.get_output_embeddings()
    linear = [n for n, m in language.named_modules() if isinstance(m, nn.Linear) and m is not head]
    unknown = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in linear)]
    if unknown or not targets:
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise RecipeError(
            f"lora.targets names {', '.join(unknown) or 'nothing'}: no matrix of the language model's layers",
            f"choose among {', '.join(known)}, or all-linear",
        )


def adapter_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters of a whole state, by the names of PEFT's files."""
    return {_PREFIX + n.replace(".default", ""): tensor for n, tensor in state.items() if is_adapter(n)}


def merged_state(state: Mapping[str, Tensor], lora: Lora) -> dict[str, Tensor]:
    """A state under the names that the model has without adapters, with them added to the weights."""
    merged: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    for name, tensor in state.items():
        if is_adapter(name):
            continue
        plain = name.replace(".base_layer.", ".")
        module = name.removesuffix(".base_layer.weight")
        if module != name:
            a, b = (state[f"{module}.lora_{side}.default.weight"].float() for side in "AB")
            changed = tensor.float() + lora.alpha / lora.r * (b @ a)
            merged[plain] = copies.setdefault(id(tensor), changed.to(tensor.dtype))
        else:
            merged[plain] = tensor
    return merged


def save_adapter(
    folder: Path, state: Mapping[str, Tensor], lora: Lora, base: str, revision: str | None
) -> None:
    """Writes a whole state's adapters as PEFT does; `base` is what they were trained beside."""
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(lora)
    config.base_model_name_or_path, config.revision, config.inference_mode = base, revision, True
    config.save_pretrained(str(folder))
    adapters = {name: tensor.contiguous() for name, tensor in adapter_state(state).items()}
    save_file(adapters, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def remove_adapters(language: nn.Module) -> None:
    """Puts the plain matrices back in the adapters' places; nothing is merged."""
    for name, layer in list(_adapted(language)):
        parent, _, child = name.rpartition(".")
        setattr(language.get_submodule(parent), child, layer.get_base_layer())


def _adapted(language: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    for name, module in language.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def _config(lora: Lora) -> LoraConfig:
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    return LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets,
        task_type="CAUSAL_LM",
    )  # fmt: skip

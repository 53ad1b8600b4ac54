"""What a tower's config.json says about its shape, read without torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from rayva.errors import WeightsError
from rayva.vision.preprocess import Aspect, Preprocessing, from_hf
from rayva.vision.weights import read_json

Kind = Literal["clip", "siglip", "efficientnet_lite"]

_MODEL_TYPES = {"clip": ("clip", "clip_vision_model"), "siglip": ("siglip", "siglip_vision_model")}
# Defaults of the Hugging Face configurations, which their config.json files may leave out.
_VIT_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip": {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "siglip": {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
}
_MOST = 1 << 16
"""No size in a config.json is larger: it also keeps damaged ones from taking all memory."""
_ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")
EFFICIENTNET_HIDDEN = 1280
EFFICIENTNET_STRIDE = 32


@dataclass(frozen=True)
class VitArchitecture:
    """Shape of a vision transformer; `image_size` is the one that its position embeddings were made for."""

    patch_size: int
    hidden_act: str
    layer_norm_eps: float
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224


@dataclass(frozen=True)
class TowerSpec:
    """All that decides a tower's features besides the weights.

    Attributes:
        layer: which hidden state is the feature map, counted from 0 (the embeddings).
        architecture: a transformer's shape; None for EfficientNet-Lite0, which has one shape.
    """

    kind: Kind
    layer: int
    preprocessing: Preprocessing
    num_tokens: int
    hidden_size: int
    architecture: VitArchitecture | None = None

    def describe(self) -> dict[str, Any]:
        """JSON data, for digests and manifests."""
        return {
            "kind": self.kind,
            "layer": self.layer,
            "num_tokens": self.num_tokens,
            "hidden_size": self.hidden_size,
            "preprocessing": self.preprocessing.describe(),
            "architecture": asdict(self.architecture) if self.architecture else {"variant": "lite0"},
        }


def read_spec(folder: Path, kind: Kind, layer: int, image_size: int | None, aspect: Aspect) -> TowerSpec:
    """Reads and checks what `folder` says about its tower.

    Raises:
        WeightsError: where files are missing, or where they and the settings do not agree.
    """
    config = read_json(folder, "config.json")
    if config is None:
        raise WeightsError(f"{folder} holds no config.json.", "give vision.path a complete weights folder")
    if kind == "efficientnet_lite":
        return _efficientnet_spec(folder, config, layer, image_size, aspect)
    return _vit_spec(folder, config, kind, layer, image_size, aspect)


def _vit_spec(
    folder: Path, config: dict[str, Any], kind: Kind, layer: int, image_size: int | None, aspect: Aspect
) -> TowerSpec:
    if config.get("model_type") not in _MODEL_TYPES[kind]:
        raise WeightsError(
            f"{folder} holds a model of type {config.get('model_type')!r}, not {kind}.",
            "set vision.kind to what the folder holds",
        )
    shape = _vit_architecture(folder, config, kind)
    preprocessing = from_hf(_processor(folder), image_size, aspect, f"{folder}/preprocessor_config.json")
    # A tower's own size may leave a margin that belongs to no patch (SigLIP so400m: 384 px, patches of 14).
    if preprocessing.image_size != shape.image_size and preprocessing.image_size % shape.patch_size:
        raise WeightsError(
            f"Images of {preprocessing.image_size} pixels do not divide into patches of {shape.patch_size}.",
            f"set vision.image_size to a multiple of {shape.patch_size}",
        )
    states = shape.num_hidden_layers + 1
    if not -states <= layer < states:
        raise WeightsError(
            f"The tower in {folder} has {states} hidden states; there is none at {layer}.",
            f"set vision.layer between {-states} and {states - 1}",
        )
    return TowerSpec(
        kind=kind,
        layer=layer % states,
        preprocessing=preprocessing,
        num_tokens=(preprocessing.image_size // shape.patch_size) ** 2,
        hidden_size=shape.hidden_size,
        architecture=shape,
    )


def _vit_architecture(folder: Path, config: dict[str, Any], kind: Kind) -> VitArchitecture:
    own = config.get("vision_config", config)
    if not isinstance(own, dict):
        raise WeightsError(
            f"{folder}/config.json: vision_config is no object.", "fetch the weights folder again"
        )
    defaults = {field.name: field.default for field in fields(VitArchitecture)} | _VIT_DEFAULTS[kind]
    settings = {name: own.get(name, default) for name, default in defaults.items()}
    for name, value in settings.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < _MOST
        whole = name == "layer_norm_eps" or isinstance(value, int)
        if not (value in _ACTIVATIONS if name == "hidden_act" else number and whole):
            raise WeightsError(
                f"{folder}/config.json: {name} = {str(value)[:80]!r} is not supported.",
                "use a tower of OpenAI's CLIP or Google's SigLIP architecture",
            )
    shape = VitArchitecture(**settings)
    if shape.hidden_size % shape.num_attention_heads:
        raise WeightsError(
            f"{folder}/config.json: hidden_size {shape.hidden_size} does not divide by num_attention_heads "
            f"{shape.num_attention_heads}.",
            "fetch the weights folder again",
        )
    return shape


def _processor(folder: Path) -> dict[str, Any]:
    own = read_json(folder, "preprocessor_config.json")
    if own is not None:
        return own
    whole = read_json(folder, "processor_config.json") or {}
    if not isinstance(whole.get("image_processor"), dict):
        raise WeightsError(
            f"{folder} does not say how images are prepared (no preprocessor_config.json).",
            "copy the file from the original checkpoint into the folder",
        )
    return dict(whole["image_processor"])


def _efficientnet_spec(
    folder: Path, config: dict[str, Any], layer: int, image_size: int | None, aspect: Aspect
) -> TowerSpec:
    if config.get("kind") != "efficientnet_lite" or config.get("variant") != "lite0":
        raise WeightsError(
            f"{folder}/config.json does not describe an EfficientNet-Lite0.",
            "set vision.kind to what the folder holds, or fetch the weights again",
        )
    if layer != -1:
        raise WeightsError(
            f"EfficientNet-Lite0 has one feature map, its last; there is no layer {layer}.",
            "set vision.layer=-1",
        )
    try:
        side = image_size or int(config["image_size"])
        mean, std = (tuple(float(v) for v in config[key]) for key in ("mean", "std"))
        resample = int(config["resample"])
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{folder}/config.json lacks or misstates {error}.", "fetch the weights again"
        ) from error
    preprocessing = Preprocessing(side, side, mean, std, resample=resample, aspect=aspect)  # type: ignore[arg-type]
    grid = math.ceil(side / EFFICIENTNET_STRIDE)
    return TowerSpec("efficientnet_lite", -1, preprocessing, grid * grid, EFFICIENTNET_HIDDEN)

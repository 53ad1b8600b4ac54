"""The frozen vision tower g(X_v) (paper, section 4.1): pictures in, grid features out.

Shape suffixes: B images, H height, W width, N grid positions (visual tokens), D hidden size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from rayva.vision.architecture import Kind, TowerSpec, read_spec
from rayva.vision.preprocess import Aspect, Preprocessing
from rayva.vision.weights import resolve_folder, weights_sha256

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class TowerDescription:
    """What a tower is, known from its files alone: neither torch nor the tensors are loaded."""

    def __init__(self, folder: Path, spec: TowerSpec) -> None:
        self.folder = folder
        self.spec = spec
        self._weights_sha256: str | None = None

    @property
    def num_tokens(self) -> int:
        """N: visual tokens an image."""
        return self.spec.num_tokens

    @property
    def hidden_size(self) -> int:
        """D: size of a visual token."""
        return self.spec.hidden_size

    @property
    def digest(self) -> str:
        """sha256 of weights, layer and preprocessing: equal digests mean equal features.

        It depends neither on the place of the folder nor on the precision that features are computed in.
        """
        text = json.dumps(self.describe(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """JSON data: exactly what is digested."""
        if self._weights_sha256 is None:
            self._weights_sha256 = weights_sha256(self.folder)
        return {"weights_sha256": self._weights_sha256, **self.spec.describe()}


def describe_tower(
    path: str,
    kind: Kind,
    layer: int,
    image_size: int | None = None,
    aspect: Aspect = "square",
    revision: str | None = None,
) -> TowerDescription:
    """Reads what the tower at `path` (a folder or a hub name) is; arguments as in `load_tower`."""
    folder = resolve_folder(path, revision)
    return TowerDescription(folder, read_spec(folder, kind, layer, image_size, aspect))


class VisionTower:
    """A frozen tower, resident on one device."""

    def __init__(self, description: TowerDescription, network: nn.Module) -> None:
        self.description = description
        self.network = network.eval().requires_grad_(False)
        parameter = next(network.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    @property
    def preprocessing(self) -> Preprocessing:
        return self.description.spec.preprocessing

    @property
    def num_tokens(self) -> int:
        """N: visual tokens an image."""
        return self.description.num_tokens

    @property
    def hidden_size(self) -> int:
        """D: size of a visual token."""
        return self.description.hidden_size

    @property
    def digest(self) -> str:
        """sha256 of weights, layer and preprocessing; see `TowerDescription.digest`."""
        return self.description.digest

    def describe(self) -> dict[str, Any]:
        """JSON data: exactly what is digested."""
        return self.description.describe()

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB pictures -> float32 [B, 3, H, W], on the CPU."""
        import torch

        return self.preprocessing.normalize(torch.from_numpy(self.preprocessing.to_uint8(images)))

    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        """float [B, 3, H, W] as `preprocess` gives it -> features [B, N, D] on the tower's device."""
        import torch

        with torch.no_grad():
            features_BND: Tensor = self.network(pixels_B3HW.to(self.device, self.dtype))
        return features_BND

    def encode_uint8(self, pixels_BHW3: np.ndarray) -> Tensor:
        """uint8 [B, H, W, 3] as `Preprocessing.to_uint8` gives it -> features [B, N, D]."""
        import torch

        pixels = torch.from_numpy(pixels_BHW3).to(self.device)
        return self.encode(self.preprocessing.normalize(pixels))


def load_tower(
    path: str,
    kind: Kind,
    layer: int,
    image_size: int | None = None,
    aspect: Aspect = "square",
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> VisionTower:
    """Loads a tower.

    Args:
        path: a folder (Hugging Face CLIP or SigLIP, whole or vision part; or an EfficientNet-Lite0
            folder), or a name on the Hugging Face hub.
        layer: index into the tower's hidden states (-2 is the penultimate layer); later layers are never run.
        image_size: side in pixels; None takes the image processor's own. Where it is not the
            transformer's own, position embeddings are interpolated.
        aspect: `square` or `pad`, see `Preprocessing`.
        dtype: precision of weights and features; None is float32.

    Raises:
        WeightsError: names the folder and the remedy.
    """
    import torch

    description = describe_tower(path, kind, layer, image_size, aspect, revision)
    network: nn.Module
    if kind == "efficientnet_lite":
        from rayva.vision.efficientnet import load_efficientnet

        network = load_efficientnet(description.folder)
    else:
        from rayva.vision.vit import load_vit

        network = load_vit(description.folder, description.spec)
    return VisionTower(description, network.to(device, dtype or torch.float32))

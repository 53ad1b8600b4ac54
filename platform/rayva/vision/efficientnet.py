"""EfficientNet-Lite0 (Tan and Le, arXiv 1905.11946; the Lite variants have no squeeze-and-excitation
and ReLU6 for Swish) as an encoder of grid features: its last map, one token a position.

Parameter names are those of the public PyTorch checkpoint, so its state dict loads as it is.

Shape suffixes: B images, H height, W width, C channels, N grid positions, D hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from rayva.errors import WeightsError
from rayva.vision.architecture import EFFICIENTNET_HIDDEN
from rayva.vision.weights import load_tensors

_BATCH_NORM_EPS = 1e-3
_STEM = 32


class _Stage(NamedTuple):
    blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int


_STAGES = (
    _Stage(1, 3, 1, 1, 16),
    _Stage(2, 3, 2, 6, 24),
    _Stage(2, 5, 2, 6, 40),
    _Stage(3, 3, 2, 6, 80),
    _Stage(3, 5, 1, 6, 112),
    _Stage(4, 5, 2, 6, 192),
    _Stage(1, 3, 1, 6, 320),
)


class _SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow's SAME: ceil(size / stride) outputs, the odd pixel at the end."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        top, bottom = _same_padding(x_BCHW.shape[-2], kernel, stride)
        left, right = _same_padding(x_BCHW.shape[-1], kernel, stride)
        if top == bottom == left == right:
            return F.conv2d(x_BCHW, self.weight, None, self.stride, top, 1, self.groups)
        padded = F.pad(x_BCHW, (left, right, top, bottom))
        return F.conv2d(padded, self.weight, None, self.stride, 0, 1, self.groups)


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=_BATCH_NORM_EPS)


class _InvertedResidual(nn.Module):
    """Expand, filter each channel, project back; with a skip where the shapes allow it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expands = expansion > 1
        self.skips = stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv = _SameConv(inputs, wide, 1)
            self._bn0 = _norm(wide)
        self._depthwise_conv = _SameConv(wide, wide, kernel, stride, groups=wide)
        self._bn1 = _norm(wide)
        self._project_conv = _SameConv(wide, outputs, 1)
        self._bn2 = _norm(outputs)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y: Tensor = x_BCHW
        if self.expands:
            y = F.relu6(self._bn0(self._expand_conv(y)))
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return y + x_BCHW if self.skips else y


class EfficientNetLite0(nn.Module):
    """The network without its classifier."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _SameConv(3, _STEM, 3, stride=2)
        self._bn0 = _norm(_STEM)
        self._blocks = nn.ModuleList()
        channels = _STEM
        for stage in _STAGES:
            for index in range(stage.blocks):
                stride = stage.stride if index == 0 else 1
                block = _InvertedResidual(channels, stage.channels, stage.kernel, stride, stage.expansion)
                self._blocks.append(block)
                channels = stage.channels
        self._conv_head = _SameConv(channels, EFFICIENTNET_HIDDEN, 1)
        self._bn1 = _norm(EFFICIENTNET_HIDDEN)

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        """float [B, 3, H, W] -> [B, N, D], positions row by row."""
        x = F.relu6(self._bn0(self._conv_stem(pixels_B3HW)))
        for block in self._blocks:
            x = block(x)
        x_BDHW = F.relu6(self._bn1(self._conv_head(x)))
        return x_BDHW.flatten(2).transpose(1, 2)


def load_efficientnet(folder: Path) -> EfficientNetLite0:
    """Loads the weights; the classifier's are left out.

    Raises:
        WeightsError: where a tensor is missing, unknown or of the wrong shape.
    """
    network = EfficientNetLite0()
    tensors = {name: t for name, t in load_tensors(folder).items() if not name.startswith("_fc.")}
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise WeightsError(
            f"The weights in {folder} are not those of an EfficientNet-Lite0: {error}",
            "fetch the weights folder again",
        ) from error
    return network


def save_efficientnet(folder: Path, tensors: Mapping[str, Tensor], image_size: int = 224) -> None:
    """Writes a tower folder from the public checkpoint's state dict.

    The preprocessing is that of the Lite models' training: bytes to [-1, 1], as (v - 127) / 128.
    """
    config: dict[str, Any] = {
        "kind": "efficientnet_lite",
        "variant": "lite0",
        "image_size": image_size,
        "mean": [127 / 255] * 3,
        "std": [128 / 255] * 3,
        "resample": 3,
    }
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: tensor.detach().to(torch.device("cpu")).contiguous() for name, tensor in tensors.items()}
    save_file(kept, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

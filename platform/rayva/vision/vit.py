"""CLIP's and SigLIP's vision transformers (arXiv 2103.00020, 2303.15343) as encoders of grid features.

Written out in plain torch, so that an encoder starts without the model library and later layers are
neither loaded nor run. Parameter names are Hugging Face's; equality with its models is tested.

Shape suffixes: B images, H height, W width, G side of the grid, N grid positions, T tokens (N, and
the CLS token where there is one), D hidden size, A attention heads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayva.errors import WeightsError
from rayva.vision.architecture import TowerSpec, VitArchitecture
from rayva.vision.weights import load_tensors


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": _quick_gelu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
}


class _Embeddings(nn.Module):
    """Patches and their positions, behind the CLS token if there is one."""

    def __init__(self, shape: VitArchitecture, has_cls: bool) -> None:
        super().__init__()
        self.grid = shape.image_size // shape.patch_size
        self.has_cls = has_cls
        if has_cls:
            self.class_embedding = nn.Parameter(torch.empty(shape.hidden_size))
        self.patch_embedding = nn.Conv2d(
            3, shape.hidden_size, shape.patch_size, shape.patch_size, bias=not has_cls
        )
        self.position_embedding = nn.Embedding(self.grid**2 + has_cls, shape.hidden_size)

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        patches_BDGG = self.patch_embedding(pixels_B3HW)
        tokens_BTD: Tensor = patches_BDGG.flatten(2).transpose(1, 2)
        if self.has_cls:
            cls_B1D = self.class_embedding.expand(len(tokens_BTD), 1, -1)
            tokens_BTD = torch.cat([cls_B1D, tokens_BTD], dim=1)
        return tokens_BTD + self._positions(patches_BDGG.shape[-1])

    def _positions(self, grid: int) -> Tensor:
        """[1, T, D]; interpolated where images are not of the size that the positions were trained for."""
        positions_1TD: Tensor = self.position_embedding.weight[None]
        if grid == self.grid:
            return positions_1TD
        cls_11D, grid_1ND = positions_1TD.tensor_split([int(self.has_cls)], dim=1)
        grid_1DGG = grid_1ND.transpose(1, 2).reshape(1, -1, self.grid, self.grid)
        resized = F.interpolate(grid_1DGG, size=(grid, grid), mode="bicubic", align_corners=False)
        return torch.cat([cls_11D, resized.flatten(2).transpose(1, 2)], dim=1)


class _Attention(nn.Module):
    def __init__(self, shape: VitArchitecture) -> None:
        super().__init__()
        size = shape.hidden_size
        self.heads = shape.num_attention_heads
        self.q_proj, self.k_proj = nn.Linear(size, size), nn.Linear(size, size)
        self.v_proj, self.out_proj = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = (
            projection(x_BTD).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, A, T, D / A]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        out_BTD: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out_BTD


class _Mlp(nn.Module):
    def __init__(self, shape: VitArchitecture) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[shape.hidden_act]
        self.fc1 = nn.Linear(shape.hidden_size, shape.intermediate_size)
        self.fc2 = nn.Linear(shape.intermediate_size, shape.hidden_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        out_BTD: Tensor = self.fc2(self.activation(self.fc1(x_BTD)))
        return out_BTD


class _Layer(nn.Module):
    def __init__(self, shape: VitArchitecture) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)
        self.self_attn = _Attention(shape)
        self.layer_norm2 = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)
        self.mlp = _Mlp(shape)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.layer_norm1(x_BTD))
        out_BTD: Tensor = x_BTD + self.mlp(self.layer_norm2(x_BTD))
        return out_BTD


class _Encoder(nn.Module):
    def __init__(self, shape: VitArchitecture, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(layers))


class GridVit(nn.Module):
    """A vision transformer up to hidden state `spec.layer`, whose grid it returns, without the CLS token."""

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        assert spec.architecture is not None
        self.has_cls = spec.kind == "clip"
        self.embeddings = _Embeddings(spec.architecture, self.has_cls)
        if self.has_cls:
            size, eps = spec.architecture.hidden_size, spec.architecture.layer_norm_eps
            self.pre_layrnorm = nn.LayerNorm(size, eps=eps)  # the checkpoints spell it so
        self.encoder = _Encoder(spec.architecture, spec.layer)

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        """float [B, 3, H, W] -> [B, N, D]."""
        x_BTD: Tensor = self.embeddings(pixels_B3HW)
        if self.has_cls:
            x_BTD = self.pre_layrnorm(x_BTD)
        for layer in self.encoder.layers:
            x_BTD = layer(x_BTD)
        return x_BTD[:, 1:] if self.has_cls else x_BTD


_PREFIX = "vision_model."
# Parts behind the feature map, and the numbers 0..T-1 that old checkpoints store.
_UNUSED = ("post_layernorm.", "head.", "embeddings.position_ids")


def load_vit(folder: Path, spec: TowerSpec) -> GridVit:
    """Builds the transformer and loads its weights, from a vision model or a whole image-text model.

    Raises:
        WeightsError: where a tensor is missing, unknown or of the wrong shape.
    """
    with torch.device("meta"):  # nothing is allocated for shapes that the weights do not have
        network = GridVit(spec)
    tensors = load_tensors(folder)
    prefixed = {k.removeprefix(_PREFIX): v for k, v in tensors.items() if k.startswith(_PREFIX)}
    later = tuple(f"encoder.layers.{i}." for i in range(spec.layer, _layers(spec)))
    wanted = {k: v for k, v in (prefixed or tensors).items() if not k.startswith(_UNUSED + later)}
    try:
        network.load_state_dict(wanted, assign=True)
    except RuntimeError as error:
        raise WeightsError(
            f"The weights in {folder} do not fit the model that its config.json describes: {error}",
            "fetch the weights folder again",
        ) from error
    return network


def _layers(spec: TowerSpec) -> int:
    assert spec.architecture is not None
    return spec.architecture.num_hidden_layers

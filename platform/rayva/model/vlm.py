"""The vision-language model: projected visual features spliced into the language model's input.

Shapes: B rows, T positions, M image places of the batch, D vision hidden size, H text hidden size,
S supervised positions, V vocabulary.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import cast

from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from rayva.model.attention import sample_borders
from rayva.model.batch import Batch, ImageCountError
from rayva.model.last_mlp import LastMlp
from rayva.model.loss import cross_entropy_sum
from rayva.model.positions import positions
from rayva.text.special import IGNORE_INDEX, IMAGE_TOKEN_INDEX


class VisionLanguageModel(nn.Module):
    """W and f of section 4.1; g runs beforehand and its features are inputs."""

    def __init__(self, language: PreTrainedModel, projector: nn.Module) -> None:
        super().__init__()
        self.language = language
        self.projector = projector
        self.last_mlp: LastMlp | None = None
        """Set where the loss may leave out what the last layer's MLP gives elsewhere."""

    @property
    def vision_hidden(self) -> int:
        """D, the feature size that the projector takes."""
        linear = self.projector if isinstance(self.projector, nn.Linear) else next(self.projector.children())
        return cast(nn.Linear, linear).in_features

    @property
    def context(self) -> int | None:
        """`positions` of the language model."""
        return positions(self.language.config)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """`loss_sum`: so that DeepSpeed's hooks around `forward` see the whole computation."""
        return self.loss_sum(batch)

    def embed(self, batch: Batch) -> Tensor:
        """Input embeddings [B, T, H]: the text's, with projected features at the image places.

        Raises `ImageCountError` when places and features differ in number.
        """
        is_image_BT = batch.input_ids_BT == IMAGE_TOKEN_INDEX
        embedding = self.language.get_input_embeddings()
        embeds_BTH = embedding(batch.input_ids_BT.masked_fill(is_image_BT, 0))
        places, given = int(is_image_BT.sum()), batch.features_MD.shape[0]
        if places != given:
            raise ImageCountError("The batch", places, given)
        dtype = next(self.projector.parameters()).dtype
        if given == 0:
            # The projector takes part in every step: with ZeRO-3 a rank that skips it leaves the
            # others waiting in its all-gather.
            nothing_1D = embeds_BTH.new_zeros(1, self.vision_hidden, dtype=dtype)
            untouched_BTH: Tensor = embeds_BTH + self.projector(nothing_1D).sum().to(embeds_BTH.dtype) * 0
            return untouched_BTH
        projected_MH = self.projector(batch.features_MD.to(dtype)).to(embeds_BTH.dtype)
        spliced_BTH: Tensor = embeds_BTH.masked_scatter(is_image_BT.unsqueeze(-1), projected_MH)
        return spliced_BTH

    def forward_hidden(self, batch: Batch) -> Tensor:
        """Last hidden states [B, T, H], before the LM head."""
        lengths = batch.sample_lengths
        borders = {} if lengths is None else sample_borders(lengths, batch.input_ids_BT.device)
        output = self.language.base_model(
            inputs_embeds=self.embed(batch),
            attention_mask=batch.attention_mask_BT,
            position_ids=batch.position_ids_BT,
            use_cache=False,
            **borders,
        )
        return cast(Tensor, output.last_hidden_state)

    def loss_sum(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over supervised tokens of the cross-entropy in fp32 (equation 3), and their number.

        Position t predicts token t + 1. Only supervised positions go through the LM head, in chunks, so that
        logits of the whole batch never exist.
        """
        targets_BT = functional.pad(batch.labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)
        supervised_BT = targets_BT != IGNORE_INDEX
        positions_S = supervised_BT.flatten().nonzero().squeeze(1)
        with self.last_mlp.at(positions_S) if self.last_mlp else nullcontext():
            hidden_BTH = self.forward_hidden(batch)
        hidden_SH = hidden_BTH.flatten(0, 1).index_select(0, positions_S)
        targets_S = targets_BT.flatten().index_select(0, positions_S)
        head = self.language.get_output_embeddings()
        return cross_entropy_sum(hidden_SH, targets_S, head), supervised_BT.sum()

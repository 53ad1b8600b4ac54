"""Batched generation with a key-value cache: greedy, or sampled with temperature and top-p.

Shapes: B rows, T prompt positions, H text hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from rayva.model.batch import Batch
from rayva.model.vlm import VisionLanguageModel

_LOWEST_TEMPERATURE = 1e-6
"""Logits that are divided by less may leave the range of fp32."""
_STOP_TOKENS_PER_CHARACTER = 4
"""A character takes at most four tokens (byte fallback), so a stop string lies in this many per character."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; a temperature below 1e-6 is greedy and ignores the rest."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    """Fixes the draws; None draws anew each time."""
    stop: tuple[str, ...] = ()
    eos_ids: tuple[int, ...] = ()

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken without a draw."""
        return self.temperature < _LOWEST_TEMPERATURE


Finish = Literal["stop", "length"]
"""Why an answer ends: the model ended it (EOS or a stop string), or it is as long as it may be."""


@dataclass(frozen=True, slots=True)
class Written:
    """A piece of an answer; the last one, and only it, has a `finish`."""

    text: str
    tokens: int
    """Tokens of the answer so far, without EOS."""
    finish: Finish | None = None


@dataclass(slots=True)
class _Row:
    limit: int
    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None


def generate(
    model: VisionLanguageModel, batch: Batch, sampling: Sampling, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """One answer for each row of a left-padded batch; it ends at EOS, a stop string or the limit."""
    rows = generate_ids(model, batch, sampling, tokenizer)
    return [cut_at_stop(decode(tokenizer, row), sampling.stop) for row in rows]


def generate_ids(
    model: VisionLanguageModel,
    batch: Batch,
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[list[int]]:
    """The new tokens of each row, without EOS; stop strings are looked for where a tokenizer is given.

    A row ends where the model's context does; one whose prompt fills the context gets a single token.
    """
    rows = [_Row(limit) for limit in _limits(model, batch, sampling)]
    for tokens in _decode(model, batch, sampling, lambda: [row.finish is not None for row in rows]):
        for row, token in zip(rows, tokens, strict=True):
            if row.finish is None:
                _append(row, token, sampling, tokenizer)
    return [row.tokens for row in rows]


def stream(
    model: VisionLanguageModel, batch: Batch, sampling: Sampling, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Written]:
    """The answer to a batch of one row, piece by piece; the texts add up to what `generate` returns.

    Text is held back while it may still be part of a stop string or of an unfinished character.
    """
    [limit] = _limits(model, batch, sampling)
    row, sent = _Row(limit), 0
    for tokens in _decode(model, batch, sampling, lambda: [row.finish is not None]):
        _append(row, tokens[0], sampling, tokenizer)
        text = cut_at_stop(decode(tokenizer, row.tokens), sampling.stop)
        safe = max(sent, len(text) if row.finish else _safe_length(text, sampling.stop))
        if safe > sent or row.finish:
            yield Written(text[sent:safe], len(row.tokens), row.finish)
            sent = safe


def _limits(model: VisionLanguageModel, batch: Batch, sampling: Sampling) -> list[int]:
    """Most new tokens of each row."""
    if model.context is None:
        return [sampling.max_new_tokens] * len(batch.input_ids_BT)
    mask_BT = batch.attention_mask_BT
    if mask_BT is None:
        mask_BT = torch.ones_like(batch.input_ids_BT)
    lengths: list[int] = mask_BT.sum(dim=1).tolist()
    return [min(sampling.max_new_tokens, max(1, model.context - length)) for length in lengths]


def decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """Text of generated tokens, without control tokens and without a leading space."""
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text).lstrip()


def cut_at_stop(text: str, stop: tuple[str, ...]) -> str:
    """`text` up to the first stop string."""
    ends = [text.find(string) for string in stop if string and string in text]
    return text[: min(ends)] if ends else text


def _append(row: _Row, token: int, sampling: Sampling, tokenizer: PreTrainedTokenizerBase | None) -> None:
    if token in sampling.eos_ids:
        row.finish = "stop"
        return
    row.tokens.append(token)
    if len(row.tokens) >= row.limit:
        row.finish = "length"
    if sampling.stop and tokenizer is not None:
        longest = max(len(string) for string in sampling.stop)
        tail = row.tokens[-_STOP_TOKENS_PER_CHARACTER * longest :]
        text = tokenizer.decode(tail, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if any(string and string in text for string in sampling.stop):
            row.finish = "stop"


def _safe_length(text: str, stop: tuple[str, ...]) -> int:
    """How much of `text` no later token can change."""
    end = len(text)
    for string in stop:
        for size in range(min(len(string), len(text)), 0, -1):
            if text.endswith(string[:size]):
                end = min(end, len(text) - size)
                break
    # Byte-level tokens decode to the replacement character until their character is complete.
    while end and text[end - 1] == "\ufffd":
        end -= 1
    return end


def _decode(
    model: VisionLanguageModel, batch: Batch, sampling: Sampling, finished: Callable[[], list[bool]]
) -> Iterator[list[int]]:
    """Yields the next token of every row until all rows are finished."""
    with torch.inference_mode():
        cache = DynamicCache(config=model.language.config)
        mask_BT = batch.attention_mask_BT
        if mask_BT is None:
            mask_BT = torch.ones_like(batch.input_ids_BT)
        logits_BV = _forward(model, model.embed(batch), mask_BT, cache)
    generator = None
    if not sampling.greedy:
        generator = torch.Generator(device=logits_BV.device)
        generator.seed() if sampling.seed is None else generator.manual_seed(sampling.seed)
    for _ in range(sampling.max_new_tokens):
        with torch.inference_mode():
            tokens_B = choose(logits_BV, sampling, generator)
        yield tokens_B.tolist()
        ended = finished()
        if all(ended):
            return
        with torch.inference_mode():
            # A row that has ended takes no further positions: there may be none in the context.
            going_on_B1 = mask_BT.new_tensor([[not end] for end in ended])
            mask_BT = torch.cat([mask_BT, going_on_B1], dim=1)
            embeds_B1H = model.language.get_input_embeddings()(tokens_B.unsqueeze(1))
            logits_BV = _forward(model, embeds_B1H, mask_BT, cache)


def _forward(model: VisionLanguageModel, embeds_BTH: Tensor, mask_BT: Tensor, cache: DynamicCache) -> Tensor:
    """Next-token logits [B, V] in fp32 of the last position, which is a real one under left padding."""
    positions_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)[:, -embeds_BTH.shape[1] :]
    output = model.language.base_model(
        inputs_embeds=embeds_BTH,
        attention_mask=mask_BT,
        position_ids=positions_BT,
        past_key_values=cache,
        use_cache=True,
    )
    logits_BV: Tensor = model.language.get_output_embeddings()(output.last_hidden_state[:, -1])
    return logits_BV.float()


def choose(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """The next token of each row [B]: the likeliest, or a draw from the top-p nucleus."""
    if sampling.greedy:
        return logits_BV.argmax(dim=-1)
    probabilities_BV = torch.softmax(logits_BV / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        ordered_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True)
        # A token stays while the mass before it is below top-p; the likeliest stays even where top-p is 0
        # in the precision of the probabilities.
        outside_BV = ordered_BV.cumsum(dim=-1) - ordered_BV >= sampling.top_p
        outside_BV[:, 0] = False
        ordered_BV = ordered_BV.masked_fill(outside_BV, 0.0)
        probabilities_BV = torch.zeros_like(probabilities_BV).scatter(-1, order_BV, ordered_BV)
    return torch.multinomial(probabilities_BV, 1, generator=generator).squeeze(-1)

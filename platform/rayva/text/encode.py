"""Token ids and labels of conversations.

Labels follow character offsets, so they are right whatever the tokenizer merges. Text that somebody
typed is encoded with a twin of the tokenizer whose control tokens carry secret names: "</s>" or
"<image>" in an answer is then ordinary text, and only a template's own markup can name a control token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING

from rayva.data.schema import IMAGE_PLACEHOLDER
from rayva.text.conversation import Message
from rayva.text.special import IGNORE_INDEX as IGNORE_INDEX
from rayva.text.special import IMAGE_TOKEN_INDEX as IMAGE_TOKEN_INDEX
from rayva.text.templates import Segment, Template
from rayva.text.twin import TokenizerTwin, twin_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sample: `input_ids` with -200 for images, `labels` of equal length with -100 where ignored.

    `prompt` is the text for people to read, without what the tokenizer puts in front.
    """

    input_ids: list[int]
    labels: list[int]
    prompt: str


def encode_sample(
    messages: Sequence[Message], template: Template, tokenizer: PreTrainedTokenizerBase
) -> Encoded:
    """A conversation for training: answers and their end markers are supervised, nothing else.

    Raises:
        BadConversation: the tokenizer's own chat template refuses the conversation.
        WeightsError: the tokenizer has no fast form.
    """
    twin = twin_of(tokenizer)
    segments = template.training(messages)
    ids, labels = _encode(segments, twin, template.adds_bos)
    return Encoded(ids, labels, "".join(_readable(segment, twin) for segment in segments))


def encode_prompt(
    messages: Sequence[Message], template: Template, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Ids of a conversation up to where the assistant is to speak; -200 for images.

    Raises:
        BadConversation: the last message is not the user's, or the chat template refuses it.
        WeightsError: the tokenizer has no fast form.
    """
    return _encode(template.generation(messages), twin_of(tokenizer), template.adds_bos)[0]


def encode_begun(
    messages: Sequence[Message], begun: str, template: Template, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Ids of a conversation in which the assistant has already said `begun` and is to go on.

    Raises: as `encode_prompt`.
    """
    template.generation(messages)  # refuses what cannot be answered
    segments = template.training([*messages, Message("assistant", (begun,))])
    last = max(index for index, segment in enumerate(segments) if segment.kind == "content")
    return _encode(segments[: last + 1], twin_of(tokenizer), template.adds_bos)[0]


def _readable(segment: Segment, twin: TokenizerTwin) -> str:
    if segment.kind == "image":
        return IMAGE_PLACEHOLDER
    if segment.kind == "bos":
        return twin.bos_token or segment.text
    if segment.kind == "eos":
        return twin.eos_token or segment.text
    return segment.text


def _encode(segments: Iterable[Segment], twin: TokenizerTwin, add_bos: bool) -> tuple[list[int], list[int]]:
    ids = list(twin.prefix_ids) if add_bos else []
    labels = [IGNORE_INDEX] * len(ids)
    chunk: list[Segment] = []
    for segment in chain(segments, (None,)):
        if segment is not None and segment.kind != "image":
            chunk.append(segment)
            continue
        # Like the original, the text after an image is encoded as the beginning of a text.
        if chunk:
            chunk_ids, chunk_labels = _encode_chunk(chunk, twin)
            ids += chunk_ids
            labels += chunk_labels
            chunk = []
        if segment is not None:
            ids.append(IMAGE_TOKEN_INDEX)
            labels.append(IGNORE_INDEX)
    return ids, labels


def _encode_chunk(chunk: Sequence[Segment], twin: TokenizerTwin) -> tuple[list[int], list[int]]:
    """Ids and labels of the text between two images."""
    pieces = [_piece(segment, twin) for segment in chunk]
    spans: list[tuple[int, int]] = []
    content_edges: list[int] = []
    end = 0
    for segment, piece in zip(chunk, pieces, strict=True):
        start, end = end, end + len(piece)
        if segment.kind == "content":
            content_edges += (start, end)
        if not segment.supervised:
            continue
        if spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    edges = list(chain.from_iterable(spans))
    ids, starts = _split_at_edges("".join(pieces), edges, content_edges, twin)
    labels = [IGNORE_INDEX] * len(ids)
    for start, end in spans:
        first, last = bisect_left(starts, start), bisect_left(starts, end)
        labels[first:last] = ids[first:last]
    return ids, labels


def _piece(segment: Segment, twin: TokenizerTwin) -> str:
    if segment.kind == "content":
        return segment.text
    if segment.kind == "bos" and twin.bos:
        return twin.bos
    if segment.kind == "eos" and twin.eos:
        return twin.eos
    return twin.markup(segment.text)


def _split_at_edges(
    text: str, edges: list[int], content_edges: list[int], twin: TokenizerTwin
) -> tuple[list[int], list[int]]:
    """Ids of `text` and where each begins, such that no token lies across an edge of a supervised span.

    Tokenizers hardly ever merge across one (white space at the beginning of an answer is the common
    case). Where they do, the text is encoded again with a boundary there, because the model will have
    to begin its answer with a token of its own. A control token that swallows white space must not
    take that of somebody's text either.
    """
    ids, offsets = twin.encode(text)
    starts = [start for start, _ in offsets]
    crossed = {edge for edge in edges if _token_across(edge, starts, offsets) is not None}
    if twin.strips:
        for edge in content_edges:
            token = _token_across(edge, starts, offsets)
            if token is not None and ids[token] in twin.control_ids:
                crossed.add(edge)
    if not crossed:
        return ids, starts
    cuts = [0, *sorted(crossed), len(text)]
    parts = (text[start:end] for start, end in pairwise(cuts))
    ids, offsets = twin.encode(twin.boundary.join(parts))
    kept_ids, starts, shift = [], [], 0
    for token_id, (start, _) in zip(ids, offsets, strict=True):
        if token_id == twin.boundary_id:
            shift += len(twin.boundary)
        else:
            kept_ids.append(token_id)
            starts.append(start - shift)
    return kept_ids, starts


def _token_across(edge: int, starts: list[int], offsets: list[tuple[int, int]]) -> int | None:
    """Index of the token that begins before `edge` and ends after it."""
    before = bisect_left(starts, edge) - 1
    return before if before >= 0 and offsets[before][1] > edge else None

"""Images between two control tokens of their own, as LLaVA's first checkpoints were trained with."""

from __future__ import annotations

from collections.abc import Sequence

from rayva.text.conversation import Message
from rayva.text.templates import Segment, Segments, Template


class MarkedImages(Template):
    """Another template, with a token in front of each image and one behind it.

    In the original, `mm_use_im_start_end` writes every `<image>` as `<im_start><image><im_end>`.
    """

    def __init__(self, template: Template, markers: tuple[str, str]) -> None:
        super().__init__(template.system, template.eos_token)
        self.name = template.name  # type: ignore[misc]  # of the class in the templates themselves
        self.adds_bos = template.adds_bos  # type: ignore[misc]
        self._template = template
        self._before, self._after = (Segment(marker) for marker in markers)

    @property
    def stop(self) -> tuple[str, ...]:
        return self._template.stop

    def _write(self, messages: Sequence[Message], open_answer: bool) -> Segments:
        write = self._template.generation if open_answer else self._template.training
        for segment in write(messages):
            if segment.kind == "image":
                yield from (self._before, segment, self._after)
            else:
                yield segment

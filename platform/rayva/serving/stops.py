"""Stop strings over a stream of text pieces."""

from __future__ import annotations


class StopFilter:
    """Passes text through up to the first stop string, and holds back what may become one.

    `push` returns what can be shown now; after the last piece, `flush` returns what was held back.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Adds a piece and returns the text that no later piece can turn into a stop string."""
        if self.stopped:
            return ""
        self._held += text
        starts = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if starts:
            self.stopped = True
            passed, self._held = self._held[: min(starts)], ""
            return passed
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        passed, self._held = self._held[:cut], self._held[cut:]
        return passed

    def flush(self) -> str:
        """What is still held back, at the end of the answer."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0

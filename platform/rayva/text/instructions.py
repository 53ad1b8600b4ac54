"""Instructions that ask for a description: 11 for a brief one, 16 for a detailed one (paper, appendix).

The wording is our own. Which one a sample gets depends on the seed and the sample's id alone, not on
the order in which samples are made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

BRIEF: Final = (
    "What does this picture show, in one sentence?",
    "Sum up the image in a few words.",
    "Say in short what can be seen here.",
    "Write a one-line caption for this photo.",
    "In brief, what is going on in the image?",
    "Tell me the main content of the picture, briefly.",
    "Put what you see into one short sentence.",
    "How would you caption this image?",
    "Name the essentials of this picture.",
    "Give the gist of what the image contains.",
    "Briefly, what am I looking at?",
)
"""Questions for stage 1, each answered by a caption."""

DETAILED: Final = (
    "Describe everything you can see in this image.",
    "Walk me through the picture in detail.",
    "Give a full account of the scene, including where things are.",
    "What does the image contain? Be as complete as you can.",
    "Please write a long and careful description of this photo.",
    "Explain to somebody who cannot see it what this picture looks like.",
    "Describe the scene at length: objects, their number, and how they relate.",
    "I would like an exhaustive description of the image.",
    "What details make up this picture? Go through all of them.",
    "Study the image closely and report what you find.",
    "Write a paragraph or two about everything visible here.",
    "Tell me about the foreground, the background and all that lies between.",
    "Portray this scene in words, leaving nothing of note out.",
    "Describe each part of the image and what it adds to the whole.",
    "Can you give me a thorough description of what is shown?",
    "List and describe what appears in the picture, with positions and looks.",
)
"""Questions for the detailed descriptions of stage 2."""


def choose_instruction(instructions: Sequence[str], seed: int, sample_id: str) -> str:
    """One of `instructions`, each with equal chance, the same for the same seed and sample."""
    digest = hashlib.sha256(f"{seed}/{sample_id}".encode()).digest()
    return instructions[int.from_bytes(digest[:8], "big") % len(instructions)]

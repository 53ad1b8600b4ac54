"""Rayva: vision-language assistants on a Ray cluster, after "Visual Instruction Tuning"."""

__version__ = "0.1.0"

"""Instruction data from captions and boxes (paper, section 3)."""

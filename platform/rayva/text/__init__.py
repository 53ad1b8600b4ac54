"""Conversations as token sequences: templates, tokenisation, label spans."""

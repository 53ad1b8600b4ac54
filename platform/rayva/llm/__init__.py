"""Talking to a paid, OpenAI-compatible chat endpoint: limits, retries, a cache of answers, and a budget."""

"""Evaluation: held-out questions, scores, the promotion gate and the report."""

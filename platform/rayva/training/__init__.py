"""The training loop of both stages: plan, samples, DeepSpeed engine, checkpoints. Knows nothing of Ray."""

"""The recipe `tiny` made small: a whole job in under a minute, for tests of what surrounds the training."""

SMALL_TINY = [
    "data.train_scenes=48", "data.validation_scenes=4", "data.test_scenes=12", "data.samples_per_image=2",
    "weights.clip_steps=6", "weights.clip_batch_size=16", "weights.language_steps=4",
    "weights.language_batch_size=8", "pretrain.batch_size=8", "pretrain.checkpoint_every=2",
    "finetune.checkpoint_every=2", "evaluation.batch_size=16",
]  # fmt: skip

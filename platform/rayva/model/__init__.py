"""The vision-language model: projector, language model, splicing, loss, generation, model folder."""

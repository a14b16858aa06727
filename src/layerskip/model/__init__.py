"""What a model is: a stack of layers, a cache, a head, and where checkpoints come from."""

"""Which settings of a recipe are best for a model: short runs chosen by what the ones before them gave."""

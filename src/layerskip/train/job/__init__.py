"""A training run from a recipe: plan, run, export."""

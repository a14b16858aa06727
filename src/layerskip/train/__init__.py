"""Training of models whose early exits can draft."""

"""Where weights come from, and what a checkpoint says of itself."""

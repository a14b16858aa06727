"""The fast decoder for Llama-shaped families."""

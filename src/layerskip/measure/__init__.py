"""What it is worth: fair timing, the cost model's prediction, draft vocabularies."""

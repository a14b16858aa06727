"""Which settings pay here: doctor and tune."""

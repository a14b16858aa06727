"""How tokens come out: sampling, rounds, text."""

"""Rounds: draft, verify, accept; led by the host, or in one piece on the device."""

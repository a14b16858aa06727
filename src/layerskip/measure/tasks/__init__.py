"""Scored tasks and the sandbox that judges programs."""

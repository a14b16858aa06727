"""Proof that drafting changes nothing: a checkpoint's own output, on this machine, against plain decoding."""

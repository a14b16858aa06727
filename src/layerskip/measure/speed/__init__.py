"""How fast: timed methods, step times, the roofline."""

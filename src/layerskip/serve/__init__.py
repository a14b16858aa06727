"""A server over HTTP in the shape of OpenAI's: one thread owns the model, rows join and leave between rounds."""

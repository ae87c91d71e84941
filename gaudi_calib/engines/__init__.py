"""What runs a model: the torch engine, and the reading of its weights."""

"""The torch engine: a Hugging Face model streamed layer by layer, and its measurement."""

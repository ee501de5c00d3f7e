"""Base models: finding them, fetching packaged ones, loading, tokenizers, layers by name."""

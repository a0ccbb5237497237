"""Opens a model and generates answers with it; trains nothing."""

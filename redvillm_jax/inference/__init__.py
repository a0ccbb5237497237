"""Opens a model and generates answers with it; must not train."""

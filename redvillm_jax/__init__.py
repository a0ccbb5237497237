"""Turn an image LLM into a video LLM by training its projector and one copy of it (RED-VILLM)."""

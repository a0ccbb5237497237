"""One file per image LLM: its config, encoder, projector, language model, prompt, tokenizer; imports modules alone."""

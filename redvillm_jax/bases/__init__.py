"""One file per image LLM: its config, encoder, projector, language model, prompt, tokenizer; imports only modules."""

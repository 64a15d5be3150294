"""Text work: tokenizer, chat template, stop strings, validation."""

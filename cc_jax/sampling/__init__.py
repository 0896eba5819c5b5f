"""Generation: from prompts and references to pictures."""

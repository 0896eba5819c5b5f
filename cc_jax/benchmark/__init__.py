"""Published test protocols: subjects and prompts from a folder, pictures drawn, scored, reported."""

"""Published test protocols: a folder of subjects and prompts, pictures drawn, scored, reported."""

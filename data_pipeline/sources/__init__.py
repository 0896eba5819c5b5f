"""Where triples come from: rendered on the fly, a TFDS data set, a folder of pictures."""

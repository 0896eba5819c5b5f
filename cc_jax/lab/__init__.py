"""The laboratory: experiments on the rendered world, whose factors are all known."""

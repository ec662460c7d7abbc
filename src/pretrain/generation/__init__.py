"""The parts of text generation: prompts, sampling, mask filling."""

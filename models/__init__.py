"""What survives training: encoders, tokenizers, preprocessing, retrieval maths, generation and checkpoint files."""

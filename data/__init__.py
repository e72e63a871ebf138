"""Text and tasks to train on, and the tokenizers that read them."""

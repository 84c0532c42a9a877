"""Text and tokens: loading tokenizers, encoding texts of any length, files of tokens and their descriptions."""

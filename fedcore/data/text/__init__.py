"""Text: where it comes from, and how it becomes tokens, windows and clients."""

"""The mean of a round's messages, and the robust rules that can take its place."""

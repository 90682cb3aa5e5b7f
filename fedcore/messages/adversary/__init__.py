"""Malicious clients, simulated: who they are, and what they send instead."""

"""Attacks on what a client sends: one file each, named after its paper."""

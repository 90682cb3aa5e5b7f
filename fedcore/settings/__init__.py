"""Settings as they are written: presets, overrides, and faults in them."""

"""Data sets of the user's own images and tables, and RefCOCO+."""

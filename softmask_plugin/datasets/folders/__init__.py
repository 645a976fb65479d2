"""Data sets of the user's own images and tables, RefCOCO+ and Flickr30k Entities."""

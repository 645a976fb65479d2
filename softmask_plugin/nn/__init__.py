"""ALBEF's encoders, with each image's keys and values projected once; needs torch only."""

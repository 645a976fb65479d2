"""ALBEF's encoders with the image's keys and values shared; torch only, no LAVIS."""

"""Speed against LAVIS, row by row: `python -m benchmarks`."""

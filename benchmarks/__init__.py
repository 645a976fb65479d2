"""Speed against LAVIS, row by row: `python -m benchmarks`."""

import softmask_plugin  # noqa: F401  (first: it prepares torch and lavis)

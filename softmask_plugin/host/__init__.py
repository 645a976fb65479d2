"""The LAVIS stack: patches, versions, what is installed and what a run ran on."""

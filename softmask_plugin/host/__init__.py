"""The LAVIS stack: patches, versions, the doctor, and the environment of a run."""

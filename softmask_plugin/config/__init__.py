"""Every option with its default and range, and the checks of a YAML file."""

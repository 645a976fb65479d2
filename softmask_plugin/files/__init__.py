"""Files: downloaded, written whole, and tensors loaded without running code."""

"""JSON, JSONL, CSV and TSV files of captions, questions and statements."""

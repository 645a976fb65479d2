"""``softmask ablate``: train variants over seeds at equal budget, and tell what each is worth."""

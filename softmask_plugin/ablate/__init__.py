"""``softmask ablate``: train variants over seeds at equal budget, and measure what each gains."""

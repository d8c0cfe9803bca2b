"""Several models beside their base: the same prompts for all, one table, one picture."""

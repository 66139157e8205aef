"""What a person sees of a run: the live table, the page, its plots."""

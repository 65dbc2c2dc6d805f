"""Records to terminal tables, figures and one self-contained page."""

"""Strata of annotated blood volume, as the haemorrhage paper reports them (Tables 4 and 5)."""

STRATA_ML: tuple[tuple[int, int], ...] = ((0, 25), (25, 50), (50, 100), (100, 300))
"""Half-open intervals (low, high] in mL."""

"""Values that a run computes of its rows once, before it trains, and keeps in its folder."""

"""Fidelity of heads against the unquantized dense head."""

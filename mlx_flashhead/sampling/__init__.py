"""Tokens drawn among a FlashHead's candidates, the whole vocabulary counted."""

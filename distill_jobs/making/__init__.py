"""A whole text-to-image pipeline from nothing but captioned pictures."""

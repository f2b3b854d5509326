"""What to change, and what it is predicted to save: small rules over one probe's numbers, each with its derivation."""

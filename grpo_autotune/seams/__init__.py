"""The one owner of every patch on TRL and vLLM: a table of seams, and one wrapper a seam that holds ordered layers."""

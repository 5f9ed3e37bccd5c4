"""Conversions: from headers to a plan of independent steps, and the streaming run of a plan."""

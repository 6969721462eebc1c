"""Placeholder until the Triton operators land in this file."""

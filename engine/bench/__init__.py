"""Measures the engine alone: what passes take, and how near that is to what the machine can do."""

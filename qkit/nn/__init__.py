"""Modules and operators of a packed model."""

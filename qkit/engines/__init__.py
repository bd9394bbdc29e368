"""Engines that run a model in an interpreter of their own: programs without qkit, and what starts them."""

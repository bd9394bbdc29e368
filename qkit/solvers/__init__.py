"""Solvers, which turn the weights of a group of linears into codes.

A solver is a function ``(Task) -> Solved``, with an optional ``(Stats, options) -> prepared`` before it. Its linears
share one input, one format and one Hessian. It knows no model, no file and no other solver. ``table`` explains how to add one.
"""

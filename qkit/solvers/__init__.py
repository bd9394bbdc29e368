"""Solvers: from the weights of a group of linears to their codes.

A solver is a function ``(Task) -> Solved``, with an optional ``(Stats, options) -> prepared`` before it. It sees linears that
share one input, one format and one Hessian; it knows no model, no file and no other solver. ``table`` says how to add one.
"""

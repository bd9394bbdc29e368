"""Transforms, which rewrite a block so that it is easier to quantize, and keep its function.

A transform of stage 'load' changes a block when it is read, before any row runs through it. One of stage 'stats' uses
statistics of the inputs of its linears. Both work on a ``BlockState``.
"""

"""Transforms: rewrites of a block that leave its function as it is and make it easier to quantize.

A transform of stage 'load' changes a block as it is read, before any row runs through it; one of stage 'stats' uses
what was seen at the inputs of its linears. Both work on a ``BlockState``.
"""

"""Privacy of a federation: mechanisms, secret keys, and accounting.

`base` is the family `[privacy]` of an experiment, `client_dp` and `row_dp` its members. `noise` makes noise from a secret
key, `accounting` computes epsilon, `guarantee` states what holds and what is outside.
"""

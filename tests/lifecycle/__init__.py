"""The life-cycle contract: what people do around a forward, with every exact pass.

``situations`` holds what happens (a weight is written between forward and backward, a gradient is
differentiated again), ``networks`` whom it happens to, ``test_lifecycle`` the promise: a rewritten
network gives what the untouched one gives, or an error of pocketize that says which pass, why, and
what to do. The table of ``docs/situations.md`` is compared with what happens.
"""

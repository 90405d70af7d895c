"""The models of a deployment: their states, loading, leases and unloading.

Who may be loaded, who has to go, what a deployment would do if it ran. What is known of memory is
in :mod:`engineroom.memory`; requests are worked on in :mod:`engineroom.inference`.
"""

"""One request through the service: begun, stopped from outside, delivered, ended.

The service chooses model and handler; what becomes of the request from there is here. How steps
become text is in :mod:`engineroom.generation`.
"""

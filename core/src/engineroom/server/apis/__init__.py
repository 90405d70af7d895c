"""What the server offers: a module an API, with its fields, its answers and its routes.

Requests become :class:`~engineroom.InferenceRequest` here and responses the API's form. How bytes
come and go is in :mod:`engineroom.server.http`.
"""

"""HTTP itself: connections, calls, limits, frames, errors, signs of life.

Nothing here knows what an API's fields are called; that is in :mod:`engineroom.server.apis`. Errors
have OpenAI's form where no route names another.
"""

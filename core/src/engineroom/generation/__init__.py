"""From decoding steps to text: what one request's tokens become, whatever made them.

Steps, the text pipeline, counts and finish reasons, and the way from an engine's thread to an
event loop. Nothing here knows of models, handlers or the service.
"""

"""Memory of the machine and of its devices: measured, and accounted for.

The account says who holds how much and who would have to go; the probe measures; the machine
tells what the process may use. Which models live and die by it is in :mod:`engineroom.models`.
"""

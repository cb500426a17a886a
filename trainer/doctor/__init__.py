"""`twotower doctor`: what a published checkpoint suffers from, in words and pictures, and what to do about it.

Deliberately does not know the command line, and changes nothing.
"""

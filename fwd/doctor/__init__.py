"""`fwctl doctor`: what may keep fwd from its work on this machine, and what to do about it.

`look.py` gathers facts, as far as they can be had; `checks.py` judges them and does nothing else, so each of its
findings can be tested without the trouble itself; `firewalls.py` knows what other firewalls' rules mean for IPsec.
"""

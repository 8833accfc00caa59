"""`reflux bench serve`: how fast the answers are, beside other ways to give them.

`world` makes a catalog, a student and users; `subjects` starts who answers; `generator` asks, in a
process of its own; `run` measures; `report` prints.
"""

"""Choose from the raw corpus the documents that serve a target; the rest of the run trains on them.

Scores are kept in the store, named by what decides them: another budget, temperature or seed needs no scoring again.
"""

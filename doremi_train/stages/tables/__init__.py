"""Tables of runs that other people trained."""

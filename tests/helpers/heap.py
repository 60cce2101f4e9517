"""Imported last by the server that processes are forked from: their garbage collector then neither
looks through what it has imported nor makes copies of these pages."""

import gc

gc.collect()
gc.freeze()

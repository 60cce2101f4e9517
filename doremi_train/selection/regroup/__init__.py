"""Domains made from text: the plumbing around `methods.clusters` over a corpus of any size.

sources → draws of all documents → the smallest of them: a sample of different texts
        → counts of words → vectors → k-means, from several starts → fine clusters
        → every document's fine cluster, summed → domains, names, levels → sidecar
"""

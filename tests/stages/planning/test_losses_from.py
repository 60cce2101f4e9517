"""The cheapest way to the reference's losses for the memory there is."""

from doremi_train.stages.planning.losses_from import Way, cheapest

WHOLE = Way("whole", "", memory=40, sequences=100, gathered=0, disk=0)
DIVIDED = Way("divided", "", memory=20, sequences=100, gathered=800, disk=0)
CACHED = Way("cached", "", memory=10, sequences=100, gathered=200, disk=5)
WAYS = (DIVIDED, CACHED, WHOLE)


def test_what_fits_and_moves_least_is_taken() -> None:
    assert cheapest(WAYS, None) == cheapest(WAYS, 40) == WHOLE
    assert cheapest(WAYS, 39) == CACHED
    assert cheapest((WHOLE, DIVIDED), 39) == DIVIDED
    assert cheapest((WHOLE, CACHED._replace(gathered=0)), 40) == WHOLE  # and no file
    assert cheapest(WAYS, 9) is None


def test_fewer_sequences_come_first() -> None:
    """As where several seeds, or an earlier command, have computed them."""
    fewer = CACHED._replace(sequences=60)
    assert cheapest((WHOLE, DIVIDED, fewer), None) == fewer

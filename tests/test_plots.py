"""What the pictures show."""

from minigrpo.run.plots import spread


def test_samples_show_different_questions():
    """200 samples, five questions about each of 40 films: even steps of 25 showed "Where is the right lung?" eight times."""
    shown = spread(list(range(200)), 8)
    assert len(set(shown)) == 8 and len({sample % 5 for sample in shown}) > 2
    assert shown == spread(list(range(200)), 8) == sorted(shown), "the same before and after, so that pictures compare"
    assert spread([3, 7], 8) == [3, 7] and spread([], 8) == []

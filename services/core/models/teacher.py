"""The teacher: large, refreshed from time to time, labels what the student learns from."""

from services.core.models.recommender import Recommender


class Teacher(Recommender):
    """A recommender that is asked for labels."""

"""Teachers: how each kind of teacher scores rollouts."""

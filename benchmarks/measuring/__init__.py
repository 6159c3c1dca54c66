"""Timing of training and predicting: processes of their own, in turns, several times."""

"""Feeds: what a model is calibrated and measured on, streamed from files, arrays or the user's code, or made up."""

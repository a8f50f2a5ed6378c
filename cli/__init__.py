"""The door: the ``tarflow`` command."""

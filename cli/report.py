"""stub"""


def report() -> None:
    pass

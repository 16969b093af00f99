"""The one exception that a person can mend."""


class TurboError(ValueError):
    """Input that a user can correct; the message names what was expected, what came, and the cure."""

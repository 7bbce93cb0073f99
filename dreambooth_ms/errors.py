"""What a user can get wrong. Each message says what was given, what was expected, and what to do.

The command line prints the message on one line per problem and exits with status 2, without a traceback.
"""


class UserError(Exception):
    """A mistake that the user can mend. Never raised for a defect of the toolkit itself."""


class ConfigError(UserError):
    """A flag or a configuration file is wrong: an unknown key, a wrong type, an impossible combination."""


class DataError(UserError):
    """A picture, a caption or an image folder cannot be used."""


class WeightError(UserError):
    """A weight file or a model folder cannot be read, or does not fit the network it is meant for."""


class DeviceError(UserError):
    """The device cannot do what was asked of it."""

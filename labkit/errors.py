"""Errors for the person who reads them: one sentence with what was wrong, what is allowed and what to do.

The command line prints these without a traceback; any other exception is a bug of labkit and keeps its traceback.
"""


class LabError(Exception):
    """Something that the user can mend."""


class InputError(LabError, ValueError):
    """An argument, parameter or model that cannot be used as given."""


class EqualityError(LabError, ArithmeticError):
    """A changed model that does not compute what it has to: it is not returned. Mended by changing less of it."""


class DataError(LabError, RuntimeError):
    """A data set, model or record that is missing, damaged or out of reach."""

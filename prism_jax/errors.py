"""The one error that means: the user's input is wrong, nothing was lost."""


class InputError(ValueError):
    """Report bad usage, configuration or data: printed as one line, exit code 2.

    The message names the place (option, file, row), the rule and the value.
    """

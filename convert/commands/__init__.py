"""The front doors of the converter, one a file: arguments in, text out."""

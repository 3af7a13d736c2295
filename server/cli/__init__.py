"""Implements the commands of the command line, each in its own module. The module `application` combines them."""

"""The command line: a module for each verb, with `add(parser)` and `run(args)`."""

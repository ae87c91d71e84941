"""The command line: parse, call one function, print. A command is in a module of its name.

main       the program: its commands, its exit codes, how errors are shown
options    options that several commands have
sections   how help groups them
pipeline   from arguments to the value that a Python call takes, and how results are printed
process    how it ends when it is told to, and the encoding of its text
"""

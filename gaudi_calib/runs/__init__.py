"""Commands over directories: a file is called as the command it implements."""

"""`python -m gaudi_calib` is `gaudi-calib`."""

import sys

from gaudi_calib.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

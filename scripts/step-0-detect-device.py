#!/usr/bin/env python3
"""Step 0: which Gaudi this machine has. Prints g2 or g3 and exits with 2 or 3; 1 where there is none.

`gaudi-calib detect` is the same without the exit codes.
"""

import argparse
import sys

from gaudi_calib.cli.main import report_errors
from gaudi_calib.engines.detect import detect_platform, require_gaudi


def main() -> int:
    """Return the generation as the exit code, as the reference does."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    device = require_gaudi(detect_platform())
    print(device.name)
    return int(device.name[1:])


if __name__ == "__main__":
    sys.exit(report_errors(main))

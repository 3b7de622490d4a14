"""``python -m turbosparse`` is the program ``turbosparse``."""

import sys

from turbosparse.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

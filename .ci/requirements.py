"""Print requirements of setup.cfg, one a line.

python .ci/requirements.py lowest   the lowest versions of the dependencies, without torch
python .ci/requirements.py newest   all versions that are allowed, without torch
python .ci/requirements.py docs     those of an extra
"""

import sys
from configparser import ConfigParser

settings, which = ConfigParser(), sys.argv[1]
settings.read("setup.cfg")
if which in ("lowest", "newest"):
    lines = [line for line in settings["options"]["install_requires"].split() if not line.startswith("torch>")]
    lowest = [line.split(",")[0].replace(">=", "==") for line in lines]
    print(*(lowest if which == "lowest" else lines), sep="\n")
else:
    print(settings["options.extras_require"][which].strip())
